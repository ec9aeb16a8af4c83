"""What a run has learned, as a model that `bagel_jax.run` loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bagel_jax.checkpoint.export import export
from bagel_jax.errors import InputError
from bagel_jax.models.weights import Weights, abstract_weights, fill
from bagel_jax.placement.mesh import make_mesh
from bagel_jax.train.autoencoder import normalized
from bagel_jax.train.checkpoints import TrainCheckpoints
from bagel_jax.train.config import TrainConfig, read_train_config
from bagel_jax.train.data import Records, read_image
from bagel_jax.train.latents import moments
from bagel_jax.train.loop import CHECKPOINTS, CONFIG_COPY
from bagel_jax.train.lora import merge_adapters
from bagel_jax.train.start import Start, make_start

EXPORT = "export"
_MEASURED = 256  # images from which the spread of latents is measured


def is_run(folder: Path) -> bool:
    """Whether a folder is the output of a training run."""
    return (folder / CONFIG_COPY).is_file() and (folder / CHECKPOINTS).is_dir()


def trained(run: Path) -> tuple[Weights, Start]:
    """The averaged weights of a run's latest checkpoint, adapters merged, float32; and what it started from.

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
    params = merge_adapters(c.lora, start.frozen, average) if c.lora is not None else start.frozen | average
    params = {path: jnp.asarray(array) for path, array in params.items()}
    weights = fill(abstract_weights(start.config, jnp.float32), params)
    if c.objective.kind == "autoencoder" and c.objective.normalize:
        deviation = _latent_deviation(c, start, weights)
        scaled = normalized(params, deviation, start.config.autoencoder.scale_factor)
        weights = fill(weights, scaled)
    return weights, start


def export_run(run: Path, dtype: str | None = None) -> Path:
    """Writes a run's latest weights to its `export` folder, in the published layout; returns the folder.

    Args:
        run: the run's output folder.
        dtype: of the tensors; None: float32.
    """
    weights, start = trained(run)
    destination = run / EXPORT
    if destination.exists():
        shutil.rmtree(destination)
    export(weights, start.config, start.tokenizer_folder, destination, dtype)
    return destination


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
