#!/usr/bin/env bash
# Makes the demo model again, from nothing: tokenizer, images, autoencoder, model. Run it in the repository's
# root, with the package installed in the python that PYTHON names. Run again, it goes on from its latest checkpoints.
set -euo pipefail
python=${PYTHON:-python}

"$python" -m tools.demo.tokenizer runs/demo/tokenizer
[ -f runs/demo/data/train.jsonl ] || "$python" -m tools.demo.data runs/demo/data
[ -d runs/demo/autoencoder/export ] || "$python" -m bagel_jax.train configs/demo_autoencoder.toml
[ -d runs/demo/model/export ] || "$python" -m bagel_jax.train configs/demo.toml
rm -rf bagel_jax/demo/model
"$python" scripts/export_weights.py runs/demo/model bagel_jax/demo/model --dtype bfloat16
