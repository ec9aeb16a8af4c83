"""A training run: from a configuration to checkpoints and an exported model."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from bagel_jax.errors import InputError
from bagel_jax.models.weights import abstract_weights, fill
from bagel_jax.placement.mesh import make_mesh
from bagel_jax.placement.rules import by_rows, replicated, rows, sharding
from bagel_jax.train.autoencoder import autoencoder_loss
from bagel_jax.train.checkpoints import TrainCheckpoints
from bagel_jax.train.config import CHECKPOINTS, CONFIG_COPY, TrainConfig
from bagel_jax.train.data import Cropper, Records, Sampler, mixture, packed_rows, prefetched
from bagel_jax.train.latents import encode_images
from bagel_jax.train.lora import merge_adapters
from bagel_jax.train.metrics import Metrics, batch_tflop, peak_tflops
from bagel_jax.train.objective import loss as bagel_loss
from bagel_jax.train.optimizer import make_optimizer
from bagel_jax.train.packing import Batch
from bagel_jax.train.start import Start, make_start
from bagel_jax.train.step import LossFunction, Params, TrainState, make_step


def train(c: TrainConfig, config_file: Path, *, quiet: bool = False) -> TrainState:
    """`run`, for whoever wants the last state alone."""
    return run(c, config_file, quiet=quiet)[1]


def run(c: TrainConfig, config_file: Path, *, quiet: bool = False) -> tuple[Start, TrainState]:
    """Runs a configuration to its end, from its latest checkpoint if it has one.

    Args:
        c: the configuration.
        config_file: where it was read from; a copy is kept in the output folder.
        quiet: no progress bars.

    Returns:
        What it started from, without what was trained, and the last state.

    Raises:
        InputError: something that the configuration names is not there or does not fit.
        FloatingPointError: the loss is not finite any more.
    """
    output = Path(c.output)
    output.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(c.mesh.data, c.mesh.fsdp)
    if c.data.rows % mesh.size:
        raise InputError(f"data.rows is {c.data.rows}; it must be a multiple of the {mesh.size} devices")
    start = make_start(c, mesh, compute_dtype(c))
    batches = iter(make_batches(c, start, quiet=quiet))
    optimizer = make_optimizer(c.optimizer, c.run.steps)
    step = make_step(make_loss(c, start, mesh), optimizer, ema=c.optimizer.ema, seed=c.seed)
    state = jax.jit(partial(TrainState.create, optimizer=optimizer))(start.trainable)
    state = jax.device_put(state, _layout(state, start.trainable, mesh))
    start.trainable.clear()  # a copy of the weights that nobody needs any more
    checkpoints = TrainCheckpoints(output / CHECKPOINTS, c.run.save_every, c.run.keep)
    if checkpoints.latest is not None:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        state = checkpoints.restore(abstract, batches)
    # Not before: the copy is what the checkpoints are exported by.
    if not (output / CONFIG_COPY).exists() or not config_file.samefile(output / CONFIG_COPY):
        shutil.copyfile(config_file, output / CONFIG_COPY)
    done = int(state.step)
    peak = c.run.peak_tflops or peak_tflops()
    metrics = Metrics(
        output / "metrics",
        done,
        c.run.steps,
        c.run.log_every,
        None if peak is None else peak * mesh.size,
        "tokens" if c.objective.kind == "bagel" else "images",
        quiet=quiet,
    )
    try:
        for number in range(done + 1, c.run.steps + 1):
            batch, count, work = _next_batch(c, start, batches)
            state, report = step(state, start.frozen, _put(batch, mesh))
            metrics.update(number, report, count, work)
            due = checkpoints.due(number, last=number == c.run.steps)
            # Looked at before every checkpoint, or the run would go on from what is not finite for ever.
            seen = {name: float(value) for name, value in report.items()} if due else metrics.last
            if not all(np.isfinite(value) for value in seen.values()):
                raise FloatingPointError(f"at step {number} the loss is not finite: {seen}")
            if due:
                checkpoints.save(number, state, batches)
    finally:
        metrics.close()
        checkpoints.close()
    return start, state


def make_batches(c: TrainConfig, start: Start, *, quiet: bool = False) -> grain.IterDataset:
    """The batches of a run, without end.

    Raises:
        InputError: a source or an image in it cannot be read.
    """
    sources = [Records(Path(source.path)) for source in c.data.sources]
    weights = [source.weight for source in c.data.sources]
    shard = jax.process_index(), jax.process_count()
    local = c.data.rows // jax.process_count()
    if c.objective.kind == "autoencoder":
        paths = sorted({path for source in sources for path in source.images()})
        crops = grain.MapDataset.source(paths)[shard[0] :: shard[1]].seed(c.seed).shuffle().repeat()
        crops = crops.random_map(Cropper(start.config, c.data.crop)).to_iter_dataset()
        return prefetched(crops.batch(local, drop_remainder=True), c.data)
    paths = sorted({path for source in sources for path, role in source.images().items() if role == "vae"})
    cache = Path(c.data.cache or Path(c.output) / "latents")
    store = encode_images(paths, start.weights(), start.config, cache, quiet=quiet)
    sampler = Sampler(start.config, start.tokenizer, c.objective, store)
    return packed_rows(mixture(sources, weights, c.seed, shard), sampler, c.data, local, c.seed)


def compute_dtype(c: TrainConfig):
    """The dtype that a run computes in; by default float32 on a CPU, where bfloat16 is slow."""
    if c.run.dtype != "auto":
        return jnp.dtype(c.run.dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def make_loss(c: TrainConfig, start: Start, mesh: Mesh) -> LossFunction:
    """The objective of a run, over parameters by path."""
    dtype = compute_dtype(c)
    abstract = abstract_weights(start.config, dtype)
    o = c.objective

    def model(trainable: Params, frozen: Params):
        params = merge_adapters(c.lora, frozen, trainable) if c.lora is not None else frozen | trainable
        weights = fill(abstract, {path: array.astype(dtype) for path, array in params.items()})
        return nnx.merge(weights.graph, weights.params)

    if o.kind == "autoencoder":
        return lambda trainable, frozen, batch, key: autoencoder_loss(
            model(trainable, frozen).autoencoder, batch.astype(dtype), key, o
        )

    def loss(trainable, frozen, batch, key):
        settings = {"ce_weight": o.ce_weight, "mse_weight": o.mse_weight, "remat": c.run.remat}
        return bagel_loss(model(trainable, frozen), batch, place=partial(by_rows, mesh), **settings)

    return loss


def _next_batch(c: TrainConfig, start: Start, batches) -> tuple[Any, int, float]:
    """The arrays of one step with the axis of accumulation in front, tokens (or images) in them, and their work."""
    parts = [next(batches) for _ in range(c.optimizer.accumulate)]
    if c.objective.kind == "autoencoder":
        return np.stack(parts), len(parts) * len(parts[0]), 0.0
    parts = [Batch.of(part) for part in parts]
    count = sum(int((part.mask.segment_ids > 0).sum()) for part in parts)
    work = sum(batch_tflop(part, start.config) for part in parts)
    return jax.tree.map(lambda *x: np.stack(x), *parts), count, work


def _put(batch, mesh):
    """Every process's rows as one array over all devices."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows(mesh), x), batch)


def _layout(state: TrainState, trainable: Params, mesh) -> TrainState:
    """Where each array of a state lies: what belongs to a parameter lies as the parameter, the rest everywhere."""

    def place(path, array):
        name = next((key.key for key in reversed(path) if getattr(key, "key", None) in trainable), None)
        return replicated(mesh) if name is None else sharding(name, array.shape, mesh)

    return jax.tree_util.tree_map_with_path(place, state)
