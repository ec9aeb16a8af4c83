"""From a request to everything that the stages need."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image
from small import CONFIG, lying, model, random_image

from bagel_jax.errors import InputError
from bagel_jax.inputs.images import prepare_image
from bagel_jax.inputs.prepare import THINK_PROMPTS, check, latent_positions, prepare, vit_positions
from bagel_jax.layout import Text, VaeImage, VitImage
from bagel_jax.request import ImageFile, Request

# Copied from the official inferencer.py, trailing spaces included.
OFFICIAL_TEXT = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. <think> reasoning process here </think> "
    "answer here"
)
OFFICIAL_IMAGE = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. <think> planning process here </think> "
    "image here"
)


def prepared(modality, *args, config=CONFIG, **kwargs):
    return prepare(Request.create(modality, *args, **kwargs), config, model().tokenizer)


def refused(function, *args, config=CONFIG, **kwargs) -> str | None:
    """What `check` or `prepare` says against a request."""
    try:
        function(Request.create(*args, **kwargs), config, model().tokenizer)
    except InputError as error:
        return str(error)
    return None


def segments(made, build=0):
    return [placed.segment for placed in made.plan.sequences[build].compute]


def text(prompt):
    return Text(model().tokenizer.prompt(prompt))


def test_regression_33_system_prompts_are_official():
    """Think mode does not think: its system prompt is not the one of training."""
    assert THINK_PROMPTS["text"] == OFFICIAL_TEXT
    assert THINK_PROMPTS["image"] == OFFICIAL_IMAGE
    assert ". \n" in OFFICIAL_TEXT
    assert ". \n" in OFFICIAL_IMAGE


@pytest.mark.parametrize(
    ("modality", "official"),
    [
        ("text2img", OFFICIAL_IMAGE),
        ("img2img", OFFICIAL_IMAGE),
        ("img2text", OFFICIAL_TEXT),
        ("text2text", OFFICIAL_TEXT),
    ],
)
def test_regression_33_think_mode_has_its_system_prompt(modality, official):
    """Think mode without its system prompt, or with that of the other kind of output: no thinking."""
    image = random_image() if modality.startswith("img") else None
    thinking = segments(prepared(modality, "a", image, think=True))
    assert thinking[0] == text(official)
    assert thinking[1:] == segments(prepared(modality, "a", image))


def test_regression_22_no_placeholder_tokens():
    """Placeholders of images stay in the text, beside the image itself."""
    tokenizer = model().tokenizer
    placeholders = set(tokenizer.prompt("<|image_pad|><|vision_pad|><|vision_start|><|vision_end|>")[1:-1])
    assert len(placeholders) == 4
    made = prepared("img2img", inputs=["a", random_image(), "b"], think=True)
    for build in made.plan.sequences:
        for placed in build.compute:
            if isinstance(placed.segment, Text):
                assert not placeholders & set(placed.segment.ids)


def test_regression_23_order_is_kept():
    """An image in the middle of a prompt moves to its beginning."""
    made = segments(prepared("img2img", inputs=["a", random_image(0), "b", random_image(1), "c"]))
    assert [type(s) for s in made] == [Text, VaeImage, VitImage, Text, VaeImage, VitImage, Text]
    assert [s.image for s in made if not isinstance(s, Text)] == [0, 0, 1, 1]
    assert [s for s in made if isinstance(s, Text)] == [text("a"), text("b"), text("c")]


def test_regression_25_images_of_different_sizes():
    """Two images of different sizes in one request crash, or one gets the other's grid."""
    made = prepared("img2img", "a", [random_image(0, 40, 40), random_image(1, 80, 40)])
    assert [p.size for p in made.images] == [(32, 32), (16, 32)]
    blocks = [(s.rows, s.columns) for s in segments(made) if isinstance(s, VaeImage)]
    assert blocks == [(8, 8), (4, 8)]
    assert [n.shape for n in made.posterior_noise] == [(16, 16, 4), (8, 16, 4)]
    grids = [(s.rows, s.columns) for s in segments(made) if isinstance(s, VitImage)]
    assert grids == [p.vit_grid for p in made.images]
    assert [len(p.vit_patches) for p in made.images] == [rows * columns for rows, columns in grids]


def test_an_edit_has_the_last_images_size():
    """An edit of two images comes out in the size of the first."""
    made = prepared("img2img", "a", [random_image(0, 40, 40), random_image(1, 80, 40)])
    assert (made.image_size, made.latent_grid, made.initial_latent.shape) == ((16, 32), (4, 8), (32, 16))


def test_regression_27_a_requested_size_of_an_edit_is_answered():
    """The requested size of an edit is ignored without a word."""
    made = prepared("img2img", "a", random_image(0, 80, 40), height=64, width=64)
    assert made.image_size == (16, 32)
    (note,) = made.notes
    assert "height and width not used" in note
    assert "32x16 (width x height)" in note
    (note,) = prepared("img2img", "a", random_image(), width=64).notes
    assert note.startswith("width not used")
    assert prepared("img2img", "a", random_image()).notes == ()


def test_understanding_uses_no_autoencoder():
    """A question about an image is slow, and answered from tokens that the model does not expect."""
    made = prepared("img2text", "a", random_image())
    assert [type(s) for s in segments(made)] == [VitImage, Text]
    assert made.posterior_noise == ()
    assert made.initial_latent is made.image_size is made.latent_grid is None


def test_understanding_computes_one_context():
    """A question about an image prefills its text twice: once more for a guidance branch that never runs."""
    assert len(prepared("img2text", "a", random_image()).plan.sequences) == 1
    assert len(prepared("img2text", "a", random_image(), think=True).plan.sequences) == 1
    assert len(prepared("text2text", "a").plan.sequences) == 1


def test_text2img_size():
    """An image comes out turned by 90 degrees or in another size than asked for."""
    made = prepared("text2img", "a", height=16, width=24)
    assert (made.image_size, made.latent_grid, made.initial_latent.shape) == ((16, 24), (4, 6), (24, 16))
    assert prepared("text2img", "a").image_size == (32, 32)
    assert prepared("text2img", "a", height=4).image_size == (4, 32)


def test_default_size_of_a_large_model():
    """Without a size, the published model makes the largest image instead of 1024 x 1024."""
    config = dataclasses.replace(CONFIG, max_latent_size=1000)
    request = Request.create("text2img", "a")
    assert request.image_size(config) == (1024, 1024)


@pytest.mark.parametrize(("name", "value"), [("height", 30), ("width", 36), ("height", 2), ("width", 1024)])
def test_sizes_that_the_model_cannot_make(name, value):
    """A size that does not fit ends in a stack trace, or in another size than asked for."""
    for function in (check, prepare):
        assert (
            refused(function, "text2img", "a", **{name: value})
            == f"{name} is {value}; it must be a multiple of 4 and at most 32 for this model"
        )


def test_negative_prompt():
    """A negative prompt is tokenized without markers, or an empty one puts markers where nothing belongs."""
    plain, empty = prepared("text2img", "a"), prepared("text2img", "a", negative_prompt="")
    assert plain.plan == empty.plan
    assert plain.plan.drop_text.length == 0
    made = prepared("text2img", "a", negative_prompt="b")
    assert segments(made, 1) == [text("b")]
    assert made.plan.drop_text.sequence == 1


def test_negative_prompt_does_nothing_to_text():
    """A negative prompt slows down a question whose answer it cannot change, and nobody is told."""
    made = prepared("text2text", "a", negative_prompt="b")
    assert made.plan == prepared("text2text", "a").plan
    assert made.notes == ("negative_prompt has no effect on text2text",)


def given_noise(**changes):
    arrays = {
        "vae_0": np.random.RandomState(0).standard_normal((1, 4, 16, 16)),
        "latent": np.random.RandomState(1).standard_normal((64, 16)),
    }
    return {name: array for name, array in (arrays | changes).items() if array is not None}


def test_given_noise_is_used_as_it_is():
    """Noise from another program is scaled, reordered or replaced: its image cannot be reproduced."""
    arrays = given_noise()
    made = prepared("img2img", "a", random_image(), init_noise=arrays, seed=5)
    assert made.initial_latent.dtype == np.float32
    assert np.array_equal(made.initial_latent, arrays["latent"].astype(np.float32))
    channels_first = made.posterior_noise[0].transpose(2, 0, 1)
    assert np.array_equal(channels_first, arrays["vae_0"][0].astype(np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae_0": None}, "init_noise has no array vae_0; it must have one of shape [1, 4, 16, 16]"),
        ({"latent": None}, "init_noise has no array latent; it must have one of shape [64, 16]"),
        ({"latent": np.zeros((16, 64))}, "init_noise has latent of shape [16, 64]; it must be [64, 16]"),
        ({"vae_0": np.zeros((4, 16, 16))}, "init_noise has vae_0 of shape [4, 16, 16]; it must be [1, 4, 16, 16]"),
        ({"latent": np.full((64, 16), np.nan)}, "init_noise has latent with values that are not finite; all must be"),
        ({"latent": np.full((64, 16), 1e300)}, "init_noise has latent with values that are not finite; all must be"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_given_noise_that_does_not_fit(changes, message):
    """Noise of another request is broadcast or cut instead of refused."""
    for function in (check, prepare):
        assert refused(function, "img2img", "a", random_image(), init_noise=given_noise(**changes)) == message


def test_positions_use_the_models_tables():
    """Positions are laid out for another table than the model's: images fall apart."""
    assert latent_positions((2, 2), CONFIG).tolist() == [0, 1, 8, 9]
    made = prepared("img2img", "a", random_image(0, 80, 40)).images[0]
    rows, columns = made.vit_grid
    wanted = [row * 4 + column for row in range(rows) for column in range(columns)]
    assert vit_positions(made, CONFIG).tolist() == wanted
    spread = dataclasses.replace(CONFIG, interpolate_positions=True)
    assert latent_positions((2, 2), spread).tolist() == [0, 4, 32, 36]


SMALL_VOCABULARY = dataclasses.replace(CONFIG, trunk=dataclasses.replace(CONFIG.trunk, vocab_size=100))


@pytest.mark.parametrize(
    ("modality", "options"),
    [
        ("text2img", {}),
        ("img2img", {"think": True, "negative_prompt": "b"}),
        ("img2img", {"init_noise": given_noise()}),
        ("img2text", {"think": True}),
        ("text2text", {"negative_prompt": "b"}),
    ],
)
def test_a_check_says_what_preparing_says(modality, options):
    """A request is refused that can be done, or found to be bad after the weights have been loaded."""
    images = {"image": random_image()} if modality.startswith("img") else {}
    for config in (CONFIG, SMALL_VOCABULARY):
        said = [refused(f, modality, "a", config=config, **images, **options) for f in (check, prepare)]
        assert said[0] == said[1]
        assert (said[0] is None) == (config is CONFIG)


@pytest.mark.parametrize("size", [(40, 40), (80, 40), (33, 500), (3, 1000), (1000, 7)])
def test_a_check_knows_the_size_without_the_pixels(tmp_path, size):
    """Every image of a run is decoded before the first request begins."""
    random_image(0, *size).save(tmp_path / "in.png")
    file = ImageFile.find(tmp_path / "in.png")
    made = prepared("img2img", "a", file)
    shapes = {"vae_0": (1, *made.posterior_noise[0].transpose(2, 0, 1).shape), "latent": made.initial_latent.shape}
    arrays = {name: np.zeros(shape) for name, shape in shapes.items()}
    (tmp_path / "in.png").unlink()
    assert refused(check, "img2img", "a", file, init_noise=arrays) is None
    wrong = arrays | {"latent": arrays["latent"][1:]}
    assert "init_noise has latent of shape" in refused(check, "img2img", "a", file, init_noise=wrong)
    assert "does not exist" in refused(prepare, "img2img", "a", file)


def test_photos_are_upright_in_requests(tmp_path):
    """Files are turned upright and images that are given as such are not, or the other way round."""
    expected = random_image(width=32, height=16)
    for path in lying(tmp_path, expected):
        for image in (path, str(path), Image.open(path)):
            prepared = model().prepare(Request.create("img2img", "a red bench", image))
            assert np.array_equal(prepared.images[0].vae_pixels, prepare_image(expected, CONFIG).vae_pixels), path
            assert prepared.images[0].size == (16, 32)


@pytest.mark.parametrize("as_file", [False, True])
def test_sizes_are_those_of_the_upright_image(tmp_path, as_file):
    """A phone's photo that lies on its side is refused for noise that fits it, before it is turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "phone.jpg"
    random_image(0, 64, 32).save(path, exif=exif)
    image = ImageFile.find(path) if as_file else Image.open(path)
    request = Request.create("img2img", inputs=[image, "a bench"])
    made = prepare(request, CONFIG, model().tokenizer)
    height, width = made.image_size
    assert height > width
    noise = {"latent": made.initial_latent, "vae_0": made.posterior_noise[0].transpose(2, 0, 1)[None]}
    check(Request.create("img2img", inputs=[image, "a bench"], init_noise=noise), CONFIG, model().tokenizer)
