"""Images to arrays: upright, onto white, the official two-step resize, patches.

Source: official `data/transforms.py`, `data/data_utils.py` and the order of calls in `inferencer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from bagel_jax.config import BagelConfig, ImageTransform


@dataclass(frozen=True)
class InputImage:
    """One input image, ready for both encoders.

    The autoencoder's resize comes first and the ViT's works on its result. `size` is the first resize's: an edit
    of the image comes out at that size.
    """

    size: tuple[int, int]  # height, width in pixels
    vae_pixels: np.ndarray  # [H, W, 3] float32 in [-1, 1]
    vit_patches: np.ndarray  # [T, patch * patch * 3] float32 in [-1, 1]
    vit_grid: tuple[int, int]  # rows, columns of patches


def prepare_image(image: Image.Image, config: BagelConfig) -> InputImage:
    """An image of any mode and size, as the model takes it."""
    image = resize(onto_white(upright(image)), config.vae_transform)
    vae_pixels = to_pixels(resize(image, config.vae_transform))
    vit_pixels = to_pixels(resize(image, config.vit_transform))
    patch = config.vit.patch_size
    return InputImage(
        size=(image.height, image.width),
        vae_pixels=vae_pixels,
        vit_patches=patchify(vit_pixels, patch),
        vit_grid=(vit_pixels.shape[0] // patch, vit_pixels.shape[1] // patch),
    )


def upright(image: Image.Image) -> Image.Image:
    """The image as viewers show it: a phone stores it as the sensor lies and says in its EXIF data how to turn it.

    The official app's page does the same before `inferencer.py` sees an image; EXIF data that cannot be read turn
    nothing there either.
    """
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow's parsers raise whatever they like
        return image


def onto_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white, in every mode that can be transparent.

    The official `pil_img2rgb` does so for RGBA and palette images. It lets grey ones with alpha turn black, and
    16-bit grey ones white where they are above 255 of 65,535; here both look as they should.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def resized_size(width: int, height: int, t: ImageTransform) -> tuple[int, int]:
    """Width and height in pixels after the resize: aspect kept up to rounding to the stride."""

    def scaled(width, height, scale):
        sides = round(width * scale), round(height * scale)
        return tuple(max(t.stride, round(side / t.stride) * t.stride) for side in sides)

    scale = max(min(t.max_size / max(width, height), 1.0), t.min_size / min(width, height))
    size = scaled(width, height, scale)
    # A ratio of areas used as a ratio of lengths is what the official code does, so such images come out smaller
    # than they need to.
    if size[0] * size[1] > t.max_pixels:
        size = scaled(*size, t.max_pixels / (size[0] * size[1]))
    if max(size) > t.max_size:
        size = scaled(*size, t.max_size / max(size))
    return size


def resize(image: Image.Image, t: ImageTransform) -> Image.Image:
    """Bicubic, antialiased resize to `resized_size`."""
    size = resized_size(*image.size, t)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def to_pixels(image: Image.Image) -> np.ndarray:
    """An RGB image as `[H, W, 3]` float32 in [-1, 1]."""
    return (np.asarray(image, np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


def to_image(pixels: np.ndarray) -> Image.Image:
    """The decoder's output `[H, W, 3]`, about [-1, 1], as an image; cut off, not rounded, as in the official code."""
    return Image.fromarray((np.clip(pixels * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8))


def patchify(pixels: np.ndarray, patch: int) -> np.ndarray:
    """`[H, W, C]` -> `[rows columns, patch patch C]`, each patch flattened (row, column, channel)."""
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    x = pixels.reshape(rows, patch, columns, patch, -1).transpose(0, 2, 1, 3, 4)
    return x.reshape(rows * columns, -1)


def grid_positions(rows: int, columns: int, side: int, interpolate: bool) -> np.ndarray:
    """Rows `[rows columns]` int32 of a `side` x `side` position table for a grid of patches.

    Plain: the grid lies in the table's corner. Interpolated: it is spread over the whole table (where a patch falls
    on a border of two places, the official code's float32 puts it now in one, now in the other, by the processor's
    vector width; here it is always the upper one).
    """

    def coordinates(count):
        return np.arange(count) * side // count if interpolate else np.arange(count)

    return (coordinates(rows)[:, None] * side + coordinates(columns)).reshape(-1).astype(np.int32)
