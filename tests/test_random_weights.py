"""scripts/random_weights.py: models of any size for benchmarks, which load and draw like any other."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import small
from commands import script_runner

from bagel_jax.bagel import Bagel
from bagel_jax.checkpoint.load import targets_of
from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.settings import EngineConfig

SCRIPT = Path(__file__).parents[1] / "scripts" / "random_weights.py"
# Images of 32 pixels at most.
_SIZES = {
    "hidden-size": 32,
    "layers": 2,
    "heads": 4,
    "kv-heads": 2,
    "mlp": 48,
    "vit-hidden-size": 24,
    "vit-layers": 2,
    "vit-heads": 2,
    "vit-mlp": 32,
    "max-vit-patches": 4,
    "ae-channels": 32,
    "ae-blocks": 1,
    "latent-channels": 4,
    "max-latent-size": 8,
}
TINY = [*(x for flag, size in _SIZES.items() for x in (f"--{flag}", size)), "--ae-multipliers", 1, 2]


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs the script in this process; returns exit code, stdout and stderr."""
    return script_runner(SCRIPT, monkeypatch, capsys)


def test_a_model_that_draws(script, tmp_path):
    """The sizes asked for, in files that the loader and the official code know, and numbers that stay finite."""
    code, out, _ = script(tmp_path / "model", *TINY)
    assert code == 0
    assert out.startswith(f"wrote {tmp_path / 'model'}: ")
    # The official code's tokenizer takes vocab.json and merges.txt.
    wanted = {"ema.safetensors", "ae.safetensors", "config.json", "llm_config.json", "vit_config.json"}
    wanted |= {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
    assert {path.name for path in (tmp_path / "model").iterdir()} == wanted
    model = Bagel.load(tmp_path / "model", "float32", settings=EngineConfig(**small.SERVING))
    trunk, autoencoder = model.config.trunk, model.config.autoencoder
    assert (trunk.hidden_size, trunk.num_layers, trunk.num_heads, trunk.num_kv_heads, trunk.head_dim) == (
        32,
        2,
        4,
        2,
        8,
    )
    assert (autoencoder.base_width, autoencoder.widths, model.config.max_latent_size) == (32, (32, 64), 8)
    latents = model.generate("text2img", "a cat", height=32, width=32, steps=4).latents
    assert np.isfinite(latents).all()
    assert 0.3 < latents.std() < 3


def test_a_seed_gives_the_same_weights_whatever_the_depth(script, tmp_path):
    """Two benchmarks of one size are of one model; another seed is another model, and depth changes only layers."""
    for name, options in (("a", ()), ("b", ()), ("c", ("--seed", "1")), ("d", ("--layers", "3"))):
        assert script(tmp_path / name, *TINY, *options)[0] == 0
    first, again, other, deeper = (checkpoints.read_tensors(tmp_path / name / "ema.safetensors") for name in "abcd")
    for name, x in first.items():
        assert np.array_equal(again[name], x), name
    embedding = "language_model.model.embed_tokens.weight"
    assert not np.array_equal(other[embedding], first[embedding])
    assert np.array_equal(deeper[embedding], first[embedding])


def test_one_block_repeated(script, tmp_path):
    """A model of 8 GB takes minutes to draw, or its numbers are not of a size that can be computed with."""
    assert script(tmp_path / "drawn", *TINY, "--layers", 3)[0] == 0
    assert script(tmp_path / "repeated", *TINY, "--layers", 3, "--repeat")[0] == 0
    drawn, repeated = (checkpoints.read_tensors(tmp_path / name / "ema.safetensors") for name in ("drawn", "repeated"))
    assert {name: x.shape for name, x in drawn.items()} == {name: x.shape for name, x in repeated.items()}
    for name, x in drawn.items():
        if x.size > 500:
            np.testing.assert_allclose(repeated[name].std(), x.std(), rtol=0.15, err_msg=name)
    layer = "language_model.model.layers.{}.mlp.up_proj.weight"
    assert np.array_equal(repeated[layer.format(0)], repeated[layer.format(2)])
    ModelSource.open(tmp_path / "repeated").load(np.float32)


def test_the_published_sizes(script):
    """A model that stands in for the 7B has other widths than it."""
    options = script.module.parse_args(["DST", "--published", "--layers", "2"])
    config = script.module.config_of(options)
    published = checkpoints.official_shapes("ema")
    assert (options.layers, config.trunk.mlp_width, config.trunk.head_dim) == (2, 18944, 128)
    ours = {t.sources[0]: t.source_shape for t in targets_of(config)}
    ours = {name: shape for name, shape in ours.items() if name in published}
    assert len(ours) > 60
    assert ours == {name: published[name] for name in ours}


def test_bfloat16_and_another_tokenizer(script, tiny_dir, tmp_path):
    """Every tensor in the dtype asked for; the vocabulary is as large as the tokenizer needs."""
    code, _, _ = script(tmp_path / "model", *TINY, "--dtype", "bfloat16", "--tokenizer-from", tiny_dir)
    assert code == 0
    assert ModelSource.open(tmp_path / "model").config.trunk.vocab_size == 768
    for file in checkpoints.FILES.values():
        assert {x.dtype.name for x in checkpoints.read_tensors(tmp_path / "model" / file).values()} == {"bfloat16"}
    assert json.loads((tmp_path / "model" / "llm_config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--hidden-size 510", "--hidden-size is 510; it must be a multiple of 16"),
        ("--hidden-size 512 --heads 6", "--hidden-size is 512; it must be a multiple of 12"),
        ("--hidden-size 6 --heads 3 --kv-heads 1", "--hidden-size is 6; it must be a multiple of 4"),
        ("--heads 8 --kv-heads 3", "--heads is 8; it must be a multiple of 3"),
        ("--vit-heads 5", "--vit-hidden-size is 256; it must be a multiple of 5"),
        ("--ae-channels 48", "--ae-channels is 48; it must be a multiple of 32"),
        ("--ae-multipliers 1 0", "--ae-multipliers is 0; it must be a whole number"),
        ("--layers 0", "--layers is 0; it must be a whole number, at least 1"),
        ("--layers many", "invalid int value"),
        ("--vocab-size 5", "--vocab-size is 5; it must be a whole number, at least 700"),
        ("--tokenizer-from /nowhere", "/nowhere holds neither tokenizer.json nor vocab.json"),
        ("--dtype int8", "invalid choice"),
    ],
)
def test_sizes_that_cannot_be(script, tmp_path, options, told):
    """One sentence and exit code 2 before anything is written, not a traceback from the middle of a model."""
    code, out, err = script(tmp_path / "model", *options.split())
    assert (code, out) == (2, "")
    assert told in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_destination_exists(script, tmp_path):
    """Nobody's model is written over."""
    code, _, err = script(tmp_path, *TINY)
    assert code == 2
    assert f"error: {tmp_path} is there already" in err
