"""What a run has learned, as a model that `bagel_jax.run` loads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bagel_jax.checkpoint.export import StoredArray, export
from bagel_jax.errors import InputError
from bagel_jax.models.weights import Weights, abstract_weights, fill
from bagel_jax.placement.mesh import make_mesh
from bagel_jax.train.autoencoder import normalized
from bagel_jax.train.checkpoints import TrainCheckpoints
from bagel_jax.train.config import CHECKPOINTS, CONFIG_COPY, LoraTable, TrainConfig, is_run, read_train_config
from bagel_jax.train.data import Records, read_image
from bagel_jax.train.latents import moments
from bagel_jax.train.lora import adapted, merge_adapter
from bagel_jax.train.start import Start, make_start
from bagel_jax.train.step import TrainState

EXPORT = "export"
_MEASURED = 256  # images from which the spread of latents is measured


def trained(run: Path) -> tuple[dict[str, Any], Start]:
    """What a run's latest checkpoint exports, read from disk, and what it started from.

    Returns:
        Float32 parameters by path, for `export`; and the start.

    Raises:
        InputError: the folder holds no run with a checkpoint.
    """
    if not is_run(run):
        raise InputError(f"{run} is no training run; it must hold {CONFIG_COPY} and {CHECKPOINTS}/")
    c = read_train_config(run / CONFIG_COPY)
    start = make_start(c, make_mesh())  # the run's own mesh may be another machine's
    checkpoints = TrainCheckpoints(run / CHECKPOINTS)
    if checkpoints.latest is None:
        raise InputError(f"{run / CHECKPOINTS} holds no checkpoint yet; train until the first is saved")
    average = checkpoints.restore_average()
    checkpoints.close()
    return _exported(c, start, average), start


def export_run(run: Path, dtype: str | None = None) -> Path:
    """Writes a run's latest weights to its `export` folder, in the published layout; returns the folder.

    Args:
        run: the run's output folder.
        dtype: of the tensors; None: float32.
    """
    return _write(*trained(run), run, dtype)


def export_state(c: TrainConfig, start: Start, state: TrainState) -> Path:
    """`export_run` of a run that has just ended: the same bytes, out of memory.

    Args:
        c: its configuration.
        start: what it started from.
        state: its last state, which must have been saved.
    """
    run = Path(c.output)
    if jax.process_count() > 1:  # no process holds all of it
        return export_run(run)
    if start.rounded:  # so that what nobody trained stays as it was
        start = make_start(c, make_mesh())
    return _write(_exported(c, start, state.ema), start, run)


def _write(params: dict[str, Any], start: Start, run: Path, dtype: str | None = None) -> Path:
    destination = run / EXPORT
    if destination.exists():
        shutil.rmtree(destination)
    export(params, start.config, start.tokenizer_folder, destination, dtype or jnp.float32)
    return destination


def _exported(c: TrainConfig, start: Start, average: Mapping[str, Any]) -> dict[str, Any]:
    """The averaged weights with all that was frozen; adapters are merged one at a time, when they are asked for."""
    if c.lora is not None:
        return start.frozen | {path: _merged(c.lora, start, average, path) for path in adapted(c.lora)}
    params = start.frozen | average
    if c.objective.kind == "autoencoder" and c.objective.normalize:
        # Wherever they lie, from here on they are the host's, so that the same numbers come out.
        params |= {path: jnp.asarray(np.asarray(array)) for path, array in average.items()}
        weights = fill(abstract_weights(start.config, jnp.float32), params)
        params = normalized(params, _latent_deviation(c, start, weights), start.config.autoencoder.scale_factor)
    return params


def _merged(lora: LoraTable, start: Start, average: Mapping[str, Any], path: str) -> StoredArray:
    def read() -> np.ndarray:
        parts = start.frozen[path], average[f"{path}.lora_a"], average[f"{path}.lora_b"]
        # On the host: the devices are full of what was trained.
        with jax.default_device(jax.devices("cpu")[0]):
            return np.asarray(merge_adapter(lora, *(np.asarray(part, np.float32) for part in parts)))

    return StoredArray(start.frozen[path].shape, np.dtype(np.float32), read)


def _latent_deviation(c: TrainConfig, start: Start, weights: Weights) -> jax.Array:
    """`[C]` standard deviation of the latents' means over images of the training set."""
    paths = sorted({path for source in c.data.sources for path in Records(Path(source.path)).images()})
    chosen = np.random.default_rng(c.seed).permutation(len(paths))[:_MEASURED]
    found = [
        np.asarray(moments(weights.graph, weights.params, read_image(paths[i], start.config).vae_pixels[None]))
        for i in chosen
    ]
    means = np.concatenate([m[..., 0, :].reshape(-1, m.shape[-1]) for m in found]).astype(np.float32)
    return jnp.asarray(means.std(axis=0))
