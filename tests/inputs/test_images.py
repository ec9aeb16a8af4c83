"""Images on their way in and out: modes, sizes, patches, positions."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import CONFIG, lying, random_image

from bagel_jax.config import ImageTransform
from bagel_jax.inputs.images import (
    grid_positions,
    onto_white,
    patchify,
    prepare_image,
    resize,
    resized_size,
    to_image,
    to_pixels,
)

VAE, VIT = ImageTransform(1024, 512, 16), ImageTransform(980, 224, 14)

# (width, height) of an image, after 1024/512/16, after 980/224/14: official MaxLongEdgeMinShortEdgeResize.
SIZES = [
    ((1, 1), (512, 512), (224, 224)),
    ((2, 1), (1024, 512), (448, 224)),
    ((1, 3), (336, 1024), (224, 672)),
    ((5, 7), (512, 720), (224, 308)),
    ((16, 16), (512, 512), (224, 224)),
    ((17, 31), (512, 928), (224, 406)),
    ((100, 1), (1024, 16), (980, 14)),
    ((1, 4000), (16, 1024), (14, 980)),
    ((224, 224), (512, 512), (224, 224)),
    ((256, 300), (512, 608), (252, 294)),
    ((500, 500), (512, 512), (504, 504)),
    ((512, 512), (512, 512), (518, 518)),
    ((513, 511), (512, 512), (518, 504)),
    ((640, 480), (688, 512), (644, 476)),
    ((480, 640), (512, 688), (476, 644)),
    ((600, 504), (608, 512), (602, 504)),
    ((333, 777), (432, 1024), (336, 784)),
    ((777, 333), (1024, 432), (784, 336)),
    ((1024, 512), (1024, 512), (980, 490)),
    ((512, 1024), (512, 1024), (490, 980)),
    ((980, 980), (976, 976), (980, 980)),
    ((1000, 1000), (992, 992), (980, 980)),
    ((1008, 1016), (1008, 1024), (966, 980)),
    ((1024, 1024), (1024, 1024), (980, 980)),
    ((1025, 1023), (1024, 1024), (980, 980)),
    ((1280, 720), (1024, 576), (980, 546)),
    ((720, 1280), (576, 1024), (546, 980)),
    ((1344, 1344), (1024, 1024), (980, 980)),
    ((1365, 1024), (1024, 768), (980, 728)),
    ((1536, 24), (1024, 16), (980, 14)),
    ((1920, 1080), (1024, 576), (980, 546)),
    ((2048, 683), (1024, 336), (980, 322)),
    ((30, 2000), (16, 1024), (14, 980)),
    ((3000, 900), (1024, 304), (980, 294)),
    ((4000, 3000), (1024, 768), (980, 728)),
    ((3024, 4032), (768, 1024), (728, 980)),
    ((6000, 400), (1024, 64), (980, 70)),
    ((400, 6000), (64, 1024), (70, 980)),
    ((10000, 10), (1024, 16), (980, 14)),
    ((10, 10000), (16, 1024), (14, 980)),
    ((15000, 14000), (1024, 960), (980, 910)),
    ((20000, 20000), (1024, 1024), (980, 980)),
]


@pytest.mark.parametrize(("size", "vae", "vit"), SIZES)
def test_sizes_are_official(size, vae, vit):
    """An edit comes out at another size than the official code's, or the ViT sees another grid."""
    assert resized_size(*size, VAE) == vae
    assert resized_size(*size, VIT) == vit


@settings(deadline=None, max_examples=60)
@given(width=st.integers(64, 5000), aspect=st.floats(0.5, 2), which=st.sampled_from([VAE, VIT]))
def test_regression_20_aspect_is_kept(width, aspect, which):
    """Faces come out stretched: every image is squeezed into a square."""
    height = round(width * aspect)
    new_width, new_height = resized_size(width, height, which)
    assert abs(new_width * height - new_height * width) <= 1.5 * which.stride * (width + height)
    assert new_width % which.stride == new_height % which.stride == 0
    assert max(new_width, new_height) <= which.max_size


def test_regression_20_pixels_are_not_stretched():
    """A circle in a wide image reaches the model as an ellipse."""
    wide = Image.new("RGB", (600, 300))
    wide.paste((255, 255, 255), (0, 0, 300, 300))
    array = np.asarray(resize(wide, VIT))
    assert array.shape == (294, 602, 3)
    assert (array[147, :, 0] > 127).sum() == pytest.approx(301, abs=1)


def test_two_resizes_in_a_row():
    """The ViT sees a small image at its own size, while it was trained on the autoencoder's enlarged one."""
    image = random_image(width=256, height=300)
    config = dataclasses.replace(CONFIG, max_latent_size=256, max_vit_patches=70)
    assert (config.vae_transform, config.vit_transform) == (VAE, VIT)
    prepared = prepare_image(image, config)
    enlarged = image.resize((512, 608), Image.Resampling.BICUBIC)
    vit = enlarged.resize((518, 602), Image.Resampling.BICUBIC)
    assert prepared.size == (608, 512)
    assert prepared.vit_grid == (43, 37)
    assert np.array_equal(prepared.vae_pixels, to_pixels(enlarged))
    assert np.array_equal(prepared.vit_patches, patchify(to_pixels(vit), 14))


def test_a_photo_is_seen_as_viewers_show_it(tmp_path):
    """A phone's photo is edited lying on its side, and comes out so."""
    image = random_image(width=32, height=16)
    expected = prepare_image(image, CONFIG)
    for path in lying(tmp_path, image):
        stored = Image.open(path)
        before = dict(stored.getexif())
        got = prepare_image(stored, CONFIG)
        assert got.size == expected.size == (16, 32), path
        assert np.array_equal(got.vae_pixels, expected.vae_pixels), path
        assert np.array_equal(got.vit_patches, expected.vit_patches), path
        assert dict(stored.getexif()) == before  # the caller's image stays as it was


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0no TIFF", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b""])
def test_damaged_exif_turns_nothing(tmp_path, exif):
    """One byte of a camera's notes makes a whole image unreadable."""
    image = random_image(width=32, height=16)
    image.save(tmp_path / "image.png", exif=exif)
    got = prepare_image(Image.open(tmp_path / "image.png"), CONFIG)
    assert np.array_equal(got.vae_pixels, prepare_image(image, CONFIG).vae_pixels)


def test_limits_of_a_small_model():
    """A model with small position tables reads past their end."""
    assert CONFIG.vae_transform == ImageTransform(32, 32, 16)
    assert CONFIG.vit_transform == ImageTransform(56, 56, 14)


def with_info(image: Image.Image, **info) -> Image.Image:
    image.info.update(info)
    return image


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    return with_info(image, transparency=0)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.asarray([[[1, 2, 3, 0], [40, 50, 60, 255]]], np.uint8)),
        palette(),
        with_info(palette(), transparency=b"\x00\xff"),
        palette().convert("PA"),
        with_info(Image.fromarray(np.asarray([[[10, 20, 30], [40, 50, 60]]], np.uint8)), transparency=(10, 20, 30)),
    ],
    ids=["RGBA", "palette", "palette-bytes", "PA", "RGB-key"],
)
def test_regression_28_transparent_is_white(image):
    """The background of a logo turns black."""
    assert np.asarray(onto_white(image)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def grey_with_alpha() -> Image.Image:
    image = Image.new("LA", (2, 1), (9, 0))
    image.putpixel((1, 0), (40, 255))
    return image


@pytest.mark.parametrize(
    "image",
    [
        grey_with_alpha(),
        with_info(Image.fromarray(np.asarray([[9, 40]], np.uint8)), transparency=9),
    ],
    ids=["LA", "L-key"],
)
def test_regression_28_transparent_grey_is_white(image):
    """The background of a grey logo turns black."""
    assert np.asarray(onto_white(image)).tolist() == [[[255, 255, 255], [40, 40, 40]]]


def test_regression_28_half_transparent_is_blended():
    """Soft edges of a logo become hard or dark: alpha 128 over white lies half way."""
    image = Image.new("RGBA", (1, 1), (0, 100, 200, 128))
    assert np.asarray(onto_white(image)).tolist() == [[[127, 177, 227]]]


@pytest.mark.parametrize(
    ("image", "rgb"),
    [
        (Image.new("RGB", (1, 1), (1, 2, 3)), [1, 2, 3]),
        (Image.new("L", (1, 1), 77), [77, 77, 77]),
        (Image.new("1", (1, 1), 1), [255, 255, 255]),
        (Image.new("1", (1, 1), 0), [0, 0, 0]),
        (Image.new("CMYK", (1, 1), (255, 0, 0, 0)), [0, 255, 255]),
        (Image.new("CMYK", (1, 1), (0, 0, 0, 0)), [255, 255, 255]),
        (Image.new("HSV", (1, 1), (0, 255, 255)), [255, 0, 0]),
    ],
    ids=["RGB", "L", "1-white", "1-black", "CMYK-cyan", "CMYK-white", "HSV"],
)
def test_modes_become_rgb(image, rgb):
    """A scan, a fax or a print file crashes or changes its colours."""
    result = onto_white(image)
    assert (result.mode, np.asarray(result)[0, 0].tolist()) == ("RGB", rgb)


def test_sixteen_bit_grey_keeps_its_shades():
    """A 16-bit scan or depth map turns white wherever it is brighter than 1/256."""
    image = Image.fromarray(np.asarray([[0, 0x4000, 0x8000, 0xFFFF]], np.uint16))
    assert image.mode == "I;16"
    assert np.asarray(onto_white(image))[0, :, 0].tolist() == pytest.approx([0, 64, 128, 255], abs=1)


def test_modes_reach_the_model():
    """A request with an odd image fails late, in the middle of the work."""
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"):
        prepared = prepare_image(Image.new(mode, (20, 20)), CONFIG)
        assert prepared.vae_pixels.shape == (32, 32, 3)
        assert prepared.vit_patches.shape == (16, 588)


def test_pixels_are_official():
    """Colours are off: pixels leave [-1, 1] or are scaled otherwise than in training."""
    grey = Image.fromarray(np.arange(256, dtype=np.uint8)[None]).convert("RGB")
    values = to_pixels(grey)[0, :, 0]
    assert values.dtype == np.float32
    hexes = {0: "-0x1p+0", 1: "-0x1.fbfbfcp-1", 64: "-0x1.fdfdfcp-2", 127: "-0x1.0101p-8", 128: "0x1.0102p-8"}
    assert {i: float(values[i]) for i in hexes} == {i: float.fromhex(h) for i, h in hexes.items()}
    # All 256 values: torch's div(255), sub(0.5), div(0.5) in float32.
    assert hashlib.sha256(values.tobytes()).hexdigest().startswith("d15e8ce722844464")


def test_images_are_cut_off_not_rounded():
    """Every pixel differs by one from the official image, or bright spots wrap around to black."""
    values = np.float32([-3, -1, -0.999, -0.5, 0, 0.25, 0.999, 0.9999, 1, 2])
    image = to_image(np.broadcast_to(values[None, :, None], (2, 10, 3)))
    # From the official decode_image's expression in torch.
    assert np.asarray(image)[1, :, 2].tolist() == [0, 0, 0, 63, 127, 159, 254, 254, 255, 255]
    assert (image.mode, image.size) == ("RGB", (10, 2))


def test_regression_18_patches_are_row_column_channel():
    """The ViT sees noise: patches are flattened in another order than its weights."""
    pixels = np.random.RandomState(0).standard_normal((6, 9, 3)).astype(np.float32)
    patches = patchify(pixels, 3)
    assert patches.shape == (6, 27)
    for row in range(2):
        for column in range(3):
            for i in range(3):
                for j in range(3):
                    for channel in range(3):
                        value = pixels[row * 3 + i, column * 3 + j, channel]
                        assert patches[row * 3 + column, (i * 3 + j) * 3 + channel] == value


def test_plain_positions():
    """Large grids of patches get the position rows of a grid of another width."""
    assert grid_positions(2, 3, 70, False).tolist() == [0, 1, 2, 70, 71, 72]
    assert grid_positions(3, 1, 64, False).tolist() == [0, 64, 128]
    positions = grid_positions(70, 70, 70, False)
    assert positions.dtype == np.int32
    assert positions.tolist() == list(range(4900))


# Official get_flattened_position_ids_interpolate for a row of `count` patches.
INTERPOLATED = {
    (70, 7): [0, 10, 20, 30, 40, 50, 60],
    (70, 11): [0, 6, 12, 19, 25, 31, 38, 44, 50, 57, 63],
    (64, 24): [0, 2, 5, 8, 10, 13, 16, 18, 21, 24, 26, 29, 32, 34, 37, 40, 42, 45, 48, 50, 53, 56, 58, 61],
    (64, 3): [0, 21, 42],
    (70, 1): [0],
}


@pytest.mark.parametrize(("side", "count"), INTERPOLATED)
def test_interpolated_positions_are_official(side, count):
    """A checkpoint with interpolated positions sees images squeezed into a corner."""
    wanted = INTERPOLATED[side, count]
    assert grid_positions(1, count, side, True).tolist() == wanted
    assert grid_positions(count, 1, side, True).tolist() == [i * side for i in wanted]


@pytest.mark.parametrize("side", [64, 70])
def test_interpolated_positions_are_exact(side):
    """Rounding puts some patches a row off: place i of n is at floor(i side / n), for every n."""
    for count in range(1, side + 1):
        rows = np.arange(count) * side // count
        wanted = rows[:, None] * side + np.arange(2) * side // 2
        assert np.array_equal(grid_positions(count, 2, side, True), wanted.reshape(-1))
