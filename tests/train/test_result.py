"""What a run leaves behind: a model that loads, with the averaged weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from commands import script_runner
from PIL import Image
from small import TOKENIZER
from training import TINY, tiny_checkpoint, tiny_weights, write_config

from bagel_jax.bagel import Bagel
from bagel_jax.checkpoint.export import export
from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.errors import InputError
from bagel_jax.inputs.images import prepare_image
from bagel_jax.models.weights import fill, flatten
from bagel_jax.train import __main__ as command
from bagel_jax.train.checkpoints import TrainCheckpoints
from bagel_jax.train.config import is_run
from bagel_jax.train.loop import train
from bagel_jax.train.lora import adapted
from bagel_jax.train.metrics import Metrics
from bagel_jax.train.result import export_run, trained

SCRIPT = Path(__file__).parents[2] / "scripts" / "export_weights.py"


def loaded(folder):
    """Parameters of a checkpoint by path, float32, and its sizes."""
    source = ModelSource.open(folder)
    return {path: np.asarray(x) for path, x in flatten(source.load(jnp.float32).params).items()}, source.config


@pytest.fixture(scope="module")
def start():
    """Parameters that all runs here start from."""
    return loaded(tiny_checkpoint())[0]


@pytest.fixture(scope="module")
def exported(six_steps):
    """The six steps' export."""
    return export_run(six_steps.output)


def test_an_export_has_the_averaged_weights(six_steps, exported, start):
    """The last weights are exported in place of their average, rounded, or without what was frozen."""
    ours, config = loaded(exported)
    assert config == TINY
    assert set(ours) == set(start)
    average = six_steps.state.ema
    for path, array in ours.items():
        np.testing.assert_array_equal(array, average.get(path, start[path]))
    kernel = "trunk.layers.gen.q.kernel"
    assert not np.array_equal(ours[kernel], six_steps.state.trainable[kernel])
    assert not np.array_equal(ours[kernel], start[kernel])


def test_an_export_serves(exported):
    """What was trained for days cannot be used."""
    model = Bagel.load(exported, dtype="float32")
    result = model.generate("text2img", inputs=["edit 1"], height=16, width=16, steps=2)
    assert result.image.size == (16, 16)


def test_an_export_is_written_anew(six_steps, exported):
    """After more training, the export is still the old one; or writing it a second time fails."""
    (exported / "ema.safetensors").write_bytes(b"old")
    again = export_run(six_steps.output)
    assert again == exported
    assert set(loaded(again)[0]) > set(six_steps.state.ema)


@pytest.mark.slow
def test_an_export_in_half_precision(six_steps, exported, tmp_path):
    """A dtype that was asked for is not the one that is written."""
    shutil.copytree(six_steps.output, tmp_path / "run")
    half, _ = loaded(export_run(tmp_path / "run", "bfloat16"))
    name = "trunk.layers.und.q.kernel"
    full = jnp.asarray(six_steps.state.ema[name])
    np.testing.assert_array_equal(half[name], full.astype(jnp.bfloat16).astype(jnp.float32))
    sizes = [(folder / "ema.safetensors").stat().st_size for folder in (tmp_path / "run" / "export", exported)]
    assert sizes[0] < 0.6 * sizes[1]


def test_the_command_trains_and_exports(six_steps, tmp_path, start, capsys):
    """LoRA's export is the model without its adapters; or the command that trained leaves no export."""
    lora = {"rank": 2, "alpha": 6.0, "projections": ["q", "down"], "experts": ["gen"]}
    _, path = write_config(tmp_path, lora=lora, run={"steps": 2})
    assert command.main([str(path), "--quiet"]) == 0
    assert capsys.readouterr().out == f"exported {tmp_path / 'run' / 'export'}\n"
    ours, _ = loaded(tmp_path / "run" / "export")
    changed = {path for path in ours if not np.array_equal(ours[path], start[path])}
    names = {f"trunk.layers.gen.{name}.kernel" for name in ("q", "down")}
    assert changed == names
    c, _ = write_config(tmp_path, lora=lora, run={"steps": 2})
    assert set(adapted(c.lora)) == names
    average = train(c, path, quiet=True).ema  # at its end already
    for name in names:
        a, b = (np.asarray(average[f"{name}.lora_{i}"], np.float64) for i in "ab")
        product = np.einsum("lir,lr...->li...", a, b)
        np.testing.assert_allclose(ours[name], start[name] + 3 * product, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_autoencoders_export_has_latents_of_unit_variance(tmp_path, start):
    """A new autoencoder is exported at the scale that it happened to come out at, or with other images."""
    c, path = write_config(tmp_path, objective={"kind": "autoencoder"}, run={"steps": 2})
    state = train(c, path, quiet=True)
    paths = sorted((tmp_path / "data").glob("*.png"))
    pixels = np.stack([prepare_image(Image.open(path), TINY).vae_pixels for path in paths])

    def both_ways(params):
        model = fill(tiny_weights(), params).model().autoencoder
        latents = model.encode(pixels, np.zeros((len(pixels), 8, 8, 4), np.float32))
        return latents, model.decode(latents)

    ours, _ = loaded(export_run(tmp_path / "run"))
    latents, images = both_ways(ours)
    np.testing.assert_allclose(np.std(latents, axis=(0, 1, 2)), 1, rtol=5e-3)
    np.testing.assert_allclose(images, both_ways(start | state.ema)[1], rtol=1e-2, atol=1e-2)


LORA = {"lora": {"rank": 2, "alpha": 6.0, "projections": ["q", "down"], "experts": ["gen"]}}
RUNS = {
    "all": {},
    "frozen": {"model": {"freeze": ["vit", "und_expert"]}},
    "adapters": LORA,
    "adapters, half precision": LORA | {"run": {"steps": 2, "dtype": "bfloat16"}},
    "autoencoder": {"objective": {"kind": "autoencoder"}},
}


@pytest.mark.parametrize("name", ["frozen", *(pytest.param(x, marks=pytest.mark.slow) for x in RUNS if x != "frozen")])
def test_nothing_is_read_again_to_export(tmp_path, monkeypatch, capsys, name):
    """Training ends with minutes of reading what is in memory already, or exports other weights than it saved."""
    start = tmp_path / "start"
    # In half precision as it would be published, so that nothing is lost where the run computes in it.
    export(tiny_weights(), TINY, TOKENIZER, start, jnp.bfloat16)
    changes = {"run": {"steps": 2}} | RUNS[name]
    changes["model"] = {"start": str(start)} | changes.get("model", {})
    _, path = write_config(tmp_path, **changes)
    close = Metrics.close

    def and_hide(metrics):  # called when training ends
        close(metrics)
        for file in start.glob("*.safetensors"):
            file.rename(file.with_suffix(".hidden"))

    with monkeypatch.context() as m:
        m.setattr(Metrics, "close", and_hide)
        m.setattr(TrainCheckpoints, "restore", lambda *_: pytest.fail("a training checkpoint was read"))
        m.setattr(TrainCheckpoints, "restore_average", lambda *_: pytest.fail("a training checkpoint was read"))
        assert command.main([str(path), "--quiet"]) == 0
    for file in start.glob("*.hidden"):
        file.rename(file.with_suffix(".safetensors"))
    assert_as_the_script_writes(tmp_path, monkeypatch, capsys)


def assert_as_the_script_writes(folder, monkeypatch, capsys):
    """The run in a folder has exported what `scripts/export_weights.py` reads from its checkpoint."""
    script = script_runner(SCRIPT, monkeypatch, capsys)
    assert script(folder / "run", folder / "again")[0] == 0
    ours, theirs = folder / "run" / "export", folder / "again"
    assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()}
    for file in ours.iterdir():
        assert file.read_bytes() == (theirs / file.name).read_bytes(), file.name


@pytest.mark.slow
def test_what_was_frozen_is_exported_with_all_its_bits(tmp_path, monkeypatch, capsys, start):
    """A run that computes in half precision rounds weights that it never trained."""
    _, path = write_config(tmp_path, **LORA, run={"steps": 2, "dtype": "bfloat16"})
    assert command.main([str(path), "--quiet"]) == 0
    assert_as_the_script_writes(tmp_path, monkeypatch, capsys)
    ours, _ = loaded(tmp_path / "run" / "export")
    np.testing.assert_array_equal(ours["trunk.embed.embedding"], start["trunk.embed.embedding"])


def test_what_is_a_run(six_steps, tmp_path):
    """A folder without a run ends in a traceback."""
    assert is_run(six_steps.output)
    assert not is_run(six_steps.folder)
    assert not is_run(tmp_path / "nothing")
    with pytest.raises(InputError, match="is no training run"):
        trained(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copyfile(six_steps.output / "config.toml", tmp_path / "run" / "config.toml")
    with pytest.raises(InputError, match="no checkpoint yet"):
        trained(tmp_path / "run")
