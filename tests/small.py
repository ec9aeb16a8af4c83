"""A BAGEL of toy sizes with random weights: edits take milliseconds, since its images are 32 pixels wide."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from bagel_jax.bagel import Bagel
from bagel_jax.config import AutoencoderConfig, BagelConfig, TrunkConfig, VitConfig
from bagel_jax.engine.context.stage import ContextStage
from bagel_jax.engine.kv.store import make_stores
from bagel_jax.models.weights import Weights, abstract_weights
from bagel_jax.placement.placement import Placement
from bagel_jax.settings import EngineConfig

TOKENIZER = Path(__file__).parent / "data" / "tiny-bagel"

CONFIG = BagelConfig(
    trunk=TrunkConfig(
        vocab_size=768,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=48,
        rope_theta=1e4,
        norm_eps=1e-6,
        activation="silu",
    ),
    vit=VitConfig(
        hidden_size=24,
        num_layers=2,
        num_heads=2,
        mlp_width=32,
        patch_size=14,
        num_positions=16,
        channels=3,
        norm_eps=1e-6,
        activation="gelu_pytorch_tanh",
    ),
    autoencoder=AutoencoderConfig(
        image_channels=3,
        base_width=32,
        widths=(32, 32),
        num_res_blocks=1,
        latent_channels=4,
        scale_factor=0.3611,
        shift_factor=0.1159,
    ),
    latent_patch_size=2,
    max_latent_size=8,
    max_vit_patches=4,
    connector_activation="gelu_pytorch_tanh",
    time_frequencies=16,
    interpolate_positions=False,
)

# Few pages, so that a pool is made in no time.
SERVING = {"num_pages": 200}


def drawn(params: nnx.State) -> nnx.State:
    """Random values for abstract parameters, the same in every run; faster than the modules' initialisers."""
    generator = np.random.RandomState(0)

    def draw(path, shape):
        values = generator.standard_normal(shape).astype(np.float32)
        if path[-1] == "scale":
            return jnp.asarray(1 + 0.1 * values)
        out = 2 if {"und", "gen"} & set(path) and path[-2] in ("q", "k", "v") else 1  # axes: heads are one more
        return jnp.asarray(values / (np.sqrt(np.prod(shape[-4:-out])) if path[-1] == "kernel" else 2))

    flat = sorted(nnx.to_flat_state(params), key=lambda item: tuple(map(str, item[0])))
    return nnx.from_flat_state((path, variable.replace(draw(path, variable.shape))) for path, variable in flat)


@functools.cache
def weights(config: BagelConfig = CONFIG) -> Weights:
    """The model's weights."""
    abstract = abstract_weights(config, jnp.float32)
    return Weights(abstract.graph, drawn(abstract.params))


@dataclasses.dataclass
class _Source:
    directory: Path = TOKENIZER
    config: BagelConfig = CONFIG

    def load(self, dtype, progress=None, sharding=None) -> Weights:
        return weights(self.config) if sharding is None else weights(self.config).on(sharding)


def new_model(config: BagelConfig = CONFIG, **settings) -> Bagel:
    """An engine that has served nobody yet."""
    return Bagel(_Source(config=config), "float32", EngineConfig(**SERVING | settings))


@functools.cache
def model() -> Bagel:
    """An engine that all tests share."""
    return new_model()


def new_stage(**settings) -> ContextStage:
    """Stage 0 of the small model, with an empty pool."""
    serving = EngineConfig(**SERVING | settings)
    place = Placement.on(jax.devices()[0])
    store, _ = make_stores((place, place), CONFIG, serving, jnp.float32)
    return ContextStage(weights(), CONFIG, model().tokenizer, serving, store)


def random_image(seed: int = 0, width: int = 40, height: int = 40) -> Image.Image:
    """An image of random pixels."""
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def lying(folder: Path, image: Image.Image) -> list[Path]:
    """An image stored in all eight ways that EXIF knows; Pillow has no function for this way round."""
    turned = Image.Transpose
    ways = {
        1: None,
        2: turned.FLIP_LEFT_RIGHT,
        3: turned.ROTATE_180,
        4: turned.FLIP_TOP_BOTTOM,
        5: turned.TRANSPOSE,
        6: turned.ROTATE_90,
        7: turned.TRANSVERSE,
        8: turned.ROTATE_270,
    }
    paths = []
    for orientation, way in ways.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        paths.append(folder / f"orientation{orientation}.png")
        (image if way is None else image.transpose(way)).save(paths[-1], exif=exif)
    return paths
