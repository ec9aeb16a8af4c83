#!/usr/bin/env bash
# Makes the demo model again, from nothing: tokenizer, pictures, autoencoder, model, polish. Run it in the repository's
# root, with the package installed in the python that PYTHON names. Run again, it goes on from its latest checkpoints.
set -euo pipefail
python=${PYTHON:-python}

"$python" -m bagel_jax.demo.tokenizer runs/demo/tokenizer
[ -f runs/demo/data/train.jsonl ] || "$python" -m bagel_jax.demo.data runs/demo/data
[ -d runs/demo/autoencoder/export ] || "$python" -m bagel_jax.train configs/demo_autoencoder.toml
[ -d runs/demo/model/export ] || "$python" -m bagel_jax.train configs/demo.toml
[ -f runs/demo/more/train.jsonl ] || "$python" -m bagel_jax.demo.data runs/demo/more --pairs 6000 --seed 1
[ -d runs/demo/polish/export ] || "$python" -m bagel_jax.train configs/demo_polish.toml
rm -rf bagel_jax/demo/model
"$python" scripts/export_weights.py runs/demo/polish bagel_jax/demo/model --dtype bfloat16
