"""The 7B model with random weights, made on the device: what is measured is speed, which weights do not change."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from checkpoints import DATA, official_shapes  # noqa: E402

from bagel_jax.bagel import Bagel  # noqa: E402
from bagel_jax.checkpoint.sizes import read_config  # noqa: E402
from bagel_jax.config import BagelConfig  # noqa: E402
from bagel_jax.demo.example import MODEL  # noqa: E402
from bagel_jax.inputs.tokenizer import Tokenizer  # noqa: E402
from bagel_jax.models.weights import Weights, abstract_weights  # noqa: E402
from bagel_jax.settings import EngineConfig  # noqa: E402


class _Official:
    """The published checkpoint's shapes and json files, without its tensors."""

    directory = DATA / "official"
    shapes = staticmethod(official_shapes)


def _draw(number, shape, name, sharding=None):
    """Bfloat16 values of about the size that trained weights have, made where they lie."""
    return jax.jit(_drawn, static_argnums=(1, 2), out_shardings=sharding)(number, shape, name)


def _drawn(number, shape, name):
    if name == "scale":
        return jnp.ones(shape, jnp.bfloat16)
    bits = jax.random.bits(jax.random.key(number, impl="rbg"), shape, jnp.uint16)
    width = 0.02 * 12**0.5  # a uniform distribution with the standard deviation 0.02
    return ((bits.astype(jnp.float32) / 65536 - 0.5) * width).astype(jnp.bfloat16)


class RandomSource:
    """Stands in for a checkpoint."""

    def __init__(self):
        self.directory: Path = MODEL  # its tokenizer
        self.config: BagelConfig = read_config(_Official())

    def load(self, dtype, progress=None, sharding=None) -> Weights:
        """14.6 billion numbers; the model never says that it is done, so that texts have the length asked for."""
        abstract = abstract_weights(self.config, dtype)
        flat = []
        for path, variable in nnx.to_flat_state(abstract.params):
            number = np.uint32(zlib.crc32(".".join(map(str, path)).encode()))
            place = sharding and sharding(".".join(map(str, path)), variable.shape)
            flat.append((path, variable.replace(_draw(number, variable.shape, path[-1], place))))
        params = nnx.from_flat_state(flat)
        head = params["trunk"]["lm_head"]["kernel"]
        head.set_value(head.get_value().at[:, Tokenizer(self.directory).im_end].set(0))
        return Weights(abstract.graph, jax.block_until_ready(params))


def random_bagel(**settings) -> Bagel:
    """The model, with its weights on the device."""
    model = Bagel(RandomSource(), "bfloat16", EngineConfig(**settings))
    model.load_weights()
    return model
