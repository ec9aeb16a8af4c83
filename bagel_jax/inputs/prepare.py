"""From a request to everything that the stages need, without touching a device or the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bagel_jax.config import BagelConfig
from bagel_jax.errors import InputError
from bagel_jax.inputs import noise
from bagel_jax.inputs.images import InputImage, grid_positions, prepare_image, resized_size
from bagel_jax.inputs.tokenizer import Tokenizer
from bagel_jax.layout import Contexts, ImageGrids, KVPlan, Text, contexts, plan
from bagel_jax.request import ImageFile, Request, upright_size

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


def check(request: Request, config: BagelConfig, tokenizer: Tokenizer) -> None:
    """Whether a model can do a request, in a fraction of the time that `prepare` takes: no pixel is looked at.

    Raises:
        InputError: what `prepare` raises, but for images that turn out to be damaged.
    """
    texts = [item for item in request.inputs if isinstance(item, str)]
    for text in (*texts, _system_prompt(request), _negative_prompt(request)):
        if text is not None:
            _text(text, config, tokenizer)
    if request.makes_image:
        t = config.vae_transform
        images = [item for item in request.inputs if not isinstance(item, str)]
        sizes = [item.size if isinstance(item, ImageFile) else upright_size(item) for item in images]
        first = [resized_size(*size, t) for size in sizes]
        size = first[-1][::-1] if first else request.image_size(config)
        if request.init_noise is not None:
            _noise(request, [resized_size(*size, t)[::-1] for size in first], size, config)


def prepare(request: Request, config: BagelConfig, tokenizer: Tokenizer) -> Prepared:
    """Plans a request for a model.

    Raises:
        InputError: the model cannot do it (a size it has no positions for), `init_noise` does not fit, or the file of
            an image is damaged.
    """
    size = request.image_size(config) if request.modality == "text2img" else None
    images, parts = [], []
    for item in request.inputs:
        if isinstance(item, str):
            parts.append(_text(item, config, tokenizer))
        else:
            image = prepare_image(item.open() if isinstance(item, ImageFile) else item, config)
            grid = _latent_grid(image.vae_pixels.shape[:2], config) if request.makes_image else None
            parts.append(ImageGrids(len(images), image.vit_grid, grid))
            images.append(image)

    system, negative = (
        None if text is None else _text(text, config, tokenizer)
        for text in (_system_prompt(request), _negative_prompt(request))
    )
    wanted = contexts(parts, system=system, negative=negative)
    if not request.makes_image:  # nothing is guided
        wanted = Contexts(wanted.cond, wanted.cond, wanted.cond)
        return Prepared(request, plan(wanted), tuple(images), (), None, None, None, request.notes)

    notes = request.notes
    if size is None:
        size = images[-1].size
        notes += _size_note(request, size)
    posterior, latent = _noise(request, [image.vae_pixels.shape[:2] for image in images], size, config)
    grid = _latent_grid(size, config)
    return Prepared(request, plan(wanted), tuple(images), posterior, size, grid, latent, notes)


def _system_prompt(request: Request) -> str | None:
    return THINK_PROMPTS["image" if request.makes_image else "text"] if request.think else None


def _negative_prompt(request: Request) -> str | None:
    """An empty one is none at all: the official context without text holds no tokens."""
    return (request.negative_prompt or None) if request.makes_image else None


def _text(text: str, config: BagelConfig, tokenizer: Tokenizer) -> Text:
    ids = tokenizer.prompt(text)
    if max(ids) >= config.trunk.vocab_size:
        raise InputError(
            f"the tokenizer gives token {max(ids)} for a text, but the model has {config.trunk.vocab_size} "
            "tokens; the tokenizer must be the model's own"
        )
    return Text(ids)


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


def _noise(
    request: Request, image_sizes: Sequence[tuple[int, int]], size: tuple[int, int], config: BagelConfig
) -> noise.Noise:
    """Posterior noise of each image, channels last, and the initial latent of an image of a size; all in pixels."""
    c = config.autoencoder
    shapes = [tuple(side // c.downsample for side in image) for image in image_sizes]
    num_tokens = math.prod(_latent_grid(size, config))
    if request.init_noise is None:
        seeds = request.image_seeds or [request.seed] * len(shapes)
        samples = [(*shape, c.latent_channels) for shape in shapes]
        latent = num_tokens, config.latent_dim
        return noise.draw(request.settings.noise, request.seed, latent, seeds, samples)

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
    posterior = tuple(given[f"vae_{i}"][0].transpose(1, 2, 0) for i in range(len(shapes)))
    return posterior, given["latent"]
