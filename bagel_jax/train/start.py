"""What a run starts from: parameters by path, which of them are trained, and their sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.checkpoint.table import resolve
from bagel_jax.config import BagelConfig
from bagel_jax.errors import InputError
from bagel_jax.inputs.tokenizer import Tokenizer
from bagel_jax.models.bagel import BagelModel
from bagel_jax.models.weights import Weights, abstract_weights, fill, flatten
from bagel_jax.placement.rules import sharding
from bagel_jax.train.config import COMPONENT_NAMES, TrainConfig
from bagel_jax.train.lora import init_adapters
from bagel_jax.train.step import Params

# Tables of sines that the official `PositionEmbedding` never trains.
_FIXED = r"(latent|vit)_positions\.embedding"


@dataclass(frozen=True)
class Start:
    """Where training starts."""

    config: BagelConfig
    tokenizer: Tokenizer
    tokenizer_folder: Path
    trainable: Params
    frozen: Params
    rounded: bool  # `frozen` does not hold all bits of what it was made from

    def weights(self) -> Weights:
        """All parameters as they stood before training, without adapters."""
        arrays = self.frozen | {k: v for k, v in self.trainable.items() if ".lora_" not in k}
        return fill(abstract_weights(self.config, jnp.float32), arrays)


def make_start(c: TrainConfig, mesh: Mesh, frozen_dtype=jnp.float32) -> Start:
    """Loads or makes the model that a run starts from, laid out on the mesh.

    Args:
        c: the configuration.
        mesh: the devices.
        frozen_dtype: of what is frozen, but for the autoencoder; the rest is float32.

    Raises:
        InputError: there is no checkpoint or tokenizer where the configuration says, or nothing is left to train.
    """

    def place(path, shape):
        return sharding(path, shape, mesh)

    if c.model.start is not None:
        source = ModelSource.open(Path(c.model.start))
        config, folder = source.config, source.directory
        params = flatten(source.load(jnp.float32, None, place).params)
    else:
        config, folder = c.model.sizes, Path(c.model.tokenizer)
        params = {k: jax.device_put(v, place(k, v.shape)) for k, v in _fresh(config, c.seed).items()}
    tokenizer = Tokenizer(folder)
    chosen = trainable_paths(c, {path: array.shape for path, array in params.items()})
    if not chosen and c.lora is None:
        raise InputError(f"model.freeze is {', '.join(c.model.freeze)} and leaves nothing to train; take something out")
    trainable = {k: params.pop(k) for k in chosen}
    if c.lora is not None:
        adapters = init_adapters(c.lora, params, c.seed)
        trainable = {k: jax.device_put(v, place(k, v.shape)) for k, v in adapters.items()}
    frozen: Params = {}
    rounded = False
    for path in list(params):
        array = params.pop(path)
        frozen[path] = array if path.startswith("autoencoder.") else array.astype(frozen_dtype)
        if not rounded and frozen[path].dtype != array.dtype:
            rounded = not bool(jnp.array_equal(frozen[path].astype(array.dtype), array, equal_nan=True))
    return Start(config, tokenizer, folder, trainable, frozen, rounded)


def trainable_paths(c: TrainConfig, shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """Parameters that a run trains. With LoRA none; with the autoencoder's objective none but its own."""
    if c.lora is not None:
        return set()
    frozen = {COMPONENT_NAMES[name] for name in c.model.freeze}
    alone = COMPONENT_NAMES["autoencoder"]
    return {
        target.path
        for target in resolve(shapes)
        if target.row.component not in frozen
        and (target.row.component == alone) == (c.objective.kind == "autoencoder")
        and not re.fullmatch(_FIXED, target.path)
    }


def _fresh(config: BagelConfig, seed: int) -> Params:
    """New parameters: Flax's defaults, position tables of sines, and a velocity that starts at zero, as officially."""
    params = flatten(nnx.state(BagelModel(config, jnp.float32, nnx.Rngs(seed)), nnx.Param))
    width = config.trunk.hidden_size
    params["latent_positions.embedding"] = sine_table(config.max_latent_size, width)
    params["vit_positions.embedding"] = sine_table(config.max_vit_patches, width)
    for name in ("kernel", "bias"):
        params[f"latent_out.{name}"] = jnp.zeros_like(params[f"latent_out.{name}"])
    return params


def sine_table(side: int, width: int) -> np.ndarray:
    """`[side², width]`: sines and cosines of the column, then of the row, as `get_2d_sincos_pos_embed` has them.

    Source: official `modeling/bagel/modeling_utils.py`.
    """
    quarter = width // 4
    angles = np.arange(side)[:, None] / 10000 ** (np.arange(quarter) / quarter)
    one = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns = np.broadcast_to(one[None], (side, side, 2 * quarter))
    rows = np.broadcast_to(one[:, None], (side, side, 2 * quarter))
    table = np.concatenate([columns, rows], axis=-1).reshape(side * side, -1)
    return np.pad(table, ((0, 0), (0, width - table.shape[1]))).astype(np.float32)
