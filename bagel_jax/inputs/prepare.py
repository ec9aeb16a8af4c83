"""From a request to everything that the stages need, without touching a device or the weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from bagel_jax.config import BagelConfig
from bagel_jax.errors import InputError
from bagel_jax.inputs import noise
from bagel_jax.inputs.images import InputImage, grid_positions, prepare_image
from bagel_jax.inputs.tokenizer import Tokenizer
from bagel_jax.layout import Contexts, ImageGrids, KVPlan, Text, contexts, plan
from bagel_jax.request import Request

# The official `inferencer.py`, to the letter, the space before the line break included.
THINK_PROMPTS = {
    "text": (
        "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
        "The reasoning process is enclosed within <think> </think> tags, "
        "i.e. <think> reasoning process here </think> answer here"
    ),
    "image": (
        "You should first think about the planning process in the mind and then generate the image. \n"
        "The planning process is enclosed within <think> </think> tags, "
        "i.e. <think> planning process here </think> image here"
    ),
}


@dataclass(frozen=True)
class Prepared:
    """A request, tokenized, planned, with its images and its noise."""

    request: Request
    plan: KVPlan
    images: tuple[InputImage, ...]
    posterior_noise: tuple[np.ndarray, ...]  # [h, w, C], one an image that the autoencoder reads
    image_size: tuple[int, int] | None  # height and width of the image to make, in pixels
    latent_grid: tuple[int, int] | None  # rows and columns of its latent tokens
    initial_latent: np.ndarray | None  # [N, C p²]
    notes: tuple[str, ...]


def prepare(request: Request, config: BagelConfig, tokenizer: Tokenizer) -> Prepared:
    """Plans a request for a model.

    Raises:
        InputError: the model cannot do it (a size it has no positions for), or `init_noise` does not fit.
    """
    size = request.image_size(config) if request.modality == "text2img" else None
    images, parts = [], []
    for item in request.inputs:
        if isinstance(item, Image.Image):
            image = prepare_image(item, config)
            grid = _latent_grid(image.vae_pixels.shape[:2], config) if request.makes_image else None
            parts.append(ImageGrids(len(images), image.vit_grid, grid))
            images.append(image)
        else:
            parts.append(Text(tokenizer.prompt(item)))

    system = negative = None
    if request.think:
        system = Text(tokenizer.prompt(THINK_PROMPTS["image" if request.makes_image else "text"]))
    # An empty negative prompt is none at all: the official context without text holds no tokens.
    if request.negative_prompt and request.makes_image:
        negative = Text(tokenizer.prompt(request.negative_prompt))
    for text in (*parts, system, negative):
        if isinstance(text, Text) and max(text.ids) >= config.trunk.vocab_size:
            raise InputError(
                f"the tokenizer gives token {max(text.ids)} for a text, but the model has {config.trunk.vocab_size} "
                "tokens; the tokenizer must be the model's own"
            )
    wanted = contexts(parts, system=system, negative=negative)
    if not request.makes_image:  # nothing is guided
        wanted = Contexts(wanted.cond, wanted.cond, wanted.cond)
        return Prepared(request, plan(wanted), tuple(images), (), None, None, None, request.notes)

    notes = request.notes
    if size is None:
        size = images[-1].size
        notes += _size_note(request, size)
    rows, columns = grid = _latent_grid(size, config)
    posterior, latent = _noise(request, images, rows * columns, config)
    return Prepared(request, plan(wanted), tuple(images), posterior, size, grid, latent, notes)


def latent_positions(grid: tuple[int, int], config: BagelConfig) -> np.ndarray:
    """Rows `[N]` of the latent position table for a grid of latent tokens."""
    return grid_positions(*grid, config.max_latent_size, config.interpolate_positions)


def vit_positions(image: InputImage, config: BagelConfig) -> np.ndarray:
    """Rows `[T]` of the ViT position tables for an image."""
    return grid_positions(*image.vit_grid, config.max_vit_patches, config.interpolate_positions)


def _latent_grid(size: tuple[int, int], config: BagelConfig) -> tuple[int, int]:
    return size[0] // config.token_pixels, size[1] // config.token_pixels


def _size_note(request: Request, size: tuple[int, int]) -> tuple[str, ...]:
    """What size an edit gets, and why, where another was asked for."""
    asked = [name for name in ("height", "width") if getattr(request.settings, name) is not None]
    if not asked:
        return ()
    why = f"{' and '.join(asked)} not used: an edit keeps the (resized) input image's size"
    return (f"{why}: {size[1]}x{size[0]} (width x height)",)


def _noise(request, images, num_tokens, config):
    """Posterior noise of each image, channels last, and the initial latent."""
    c = config.autoencoder
    shapes = [tuple(side // c.downsample for side in p.vae_pixels.shape[:2]) for p in images]
    if request.init_noise is None:
        seeds = request.image_seeds or [request.seed] * len(shapes)
        posterior = tuple(
            noise.posterior(seed, i, *shape, c.latent_channels)
            for i, (seed, shape) in enumerate(zip(seeds, shapes, strict=True))
        )
        return posterior, noise.initial_latent(request.seed, num_tokens, config.latent_dim)

    wanted = {f"vae_{i}": (1, c.latent_channels, *shape) for i, shape in enumerate(shapes)}
    wanted["latent"] = (num_tokens, config.latent_dim)
    given = {}
    for name, shape in wanted.items():
        array = request.init_noise.get(name)
        if array is None:
            raise InputError(f"init_noise has no array {name}; it must have one of shape {list(shape)}")
        if tuple(np.shape(array)) != shape:
            raise InputError(f"init_noise has {name} of shape {list(np.shape(array))}; it must be {list(shape)}")
        if np.asarray(array).dtype.kind not in "fiu":
            raise InputError(f"init_noise has {name} of dtype {np.asarray(array).dtype}; it must hold real numbers")
        given[name] = np.asarray(array, np.float32)
        if not np.isfinite(given[name]).all():
            raise InputError(f"init_noise has {name} with values that are not finite; all must be")
    posterior = tuple(given[f"vae_{i}"][0].transpose(1, 2, 0) for i in range(len(images)))
    return posterior, given["latent"]
