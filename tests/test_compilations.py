"""What must not compile anything: on the real model each new program costs minutes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from commands import small_copy
from PIL import Image

from bagel_jax.bagel import Bagel
from bagel_jax.models.weights import abstract_weights
from bagel_jax.request import Request

_EVENT = "/jax/core/compile/backend_compile_duration"


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the programs compiled inside, whether or not the persistent cache had them."""
    compiled: list[str] = []

    def listen(event: str, _: float, **about) -> None:
        if event == _EVENT:
            compiled.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def compiled_by(model: Bagel, changes: list[dict], *args, known: tuple[dict, ...] = (), **settings):
    """The programs that each change compiles after the request was answered as it stands, and with `known` changes."""
    for change in ({}, *known):
        model.generate(*args, **(settings | change))
    counts = {}
    for change in changes:
        with compilations() as compiled:
            model.generate(*args, **(settings | change))
        if compiled:
            counts[str(change)] = compiled
    return counts


@pytest.fixture(scope="module")
def tiny(tiny_dir) -> Bagel:
    """A model that has served nobody: of what others have asked it would find prefixes, and not compute them."""
    return Bagel.load(tiny_dir, dtype="float32")


DENOISING = [
    {"steps": 5},
    {"cfg_text_scale": 2.5},
    {"cfg_text_scale": 1.0},  # off
    {"cfg_img_scale": 3.0},
    {"cfg_img_scale": 1.0},  # off
    {"timestep_shift": 1.0},
    {"cfg_interval": (0.0, 0.5)},
    {"cfg_renorm_type": "global"},
    {"cfg_renorm_type": "channel"},
    {"cfg_renorm_type": "text_channel"},
    {"cfg_renorm_min": 0.5},
    {"seed": 5},
]
# So few programs: with each number of branches that a step may need, one.
BRANCHES = {"cfg_text_scale": 1.0}, {"cfg_img_scale": 1.0}
DECODING = [
    {"seed": 5},
    {"do_sample": True},
    {"do_sample": True, "seed": 7, "text_temperature": 0.9},
    {"max_tokens": 24},
    {"max_tokens": 9},
    {"progress": lambda *_: None},
]
# Sizes that no other test uses.
THINKING = {"height": 144, "width": 240, "steps": 4, "think": True, "max_think_tokens": 150}
# Two that are padded to 16 tokens, and one that is not.
PROMPT, AS_LONG, LONGER = "a red bench below a blue clock", "two zebras", "one two three four five six seven eight"
# Asked before: now images are known, so that a text alone is prefilled, and the next one compiles nothing.
WARM_UP = "three cats"


@pytest.fixture(scope="module")
def small(tiny) -> Bagel:
    """The small checkpoint with input images resized to 64 pixels instead of 512."""
    return small_copy(tiny)


@pytest.fixture(scope="module")
def image(cases_dir):
    return cases_dir / "img2img_in0.png"


def test_text2img_settings_compile_nothing(tiny):
    """A slider moved in the app would cost a compilation."""
    size = {"height": 96, "width": 160, "steps": 3}
    lengths = [len(tiny.tokenizer.prompt(prompt)) for prompt in (AS_LONG, PROMPT, LONGER)]
    assert lengths[0] < lengths[1] <= 16 < lengths[2]
    assert compiled_by(tiny, DENOISING, "text2img", PROMPT, known=BRANCHES, **size) == {}
    with compilations() as compiled:
        tiny.generate("text2img", AS_LONG, **size)
    assert compiled == []
    with compilations() as compiled:  # or else nothing has been counted above
        tiny.generate("text2img", PROMPT, **(size | {"width": 208}))
    assert "denoise" in " ".join(compiled)


def test_each_program_compiles_once(tiny):
    """The second step, and the ninth token, would wait for the same program to be compiled a second time."""
    with compilations() as compiled:
        tiny.generate("text2img", PROMPT, **THINKING, progress=lambda *_: None)
    assert [compiled.count(name) for name in ("jit(denoise)", "jit(decode_latents)")] == [1, 1]
    assert compiled.count("jit(decode)") <= 1  # none where another test has decoded one row
    with compilations() as compiled:
        tiny.generate("text2img", PROMPT, **THINKING)
    assert compiled == []


def test_think_settings_compile_nothing(tiny):
    """The same for images that are planned in words first."""
    changes = [{"steps": 3}, {"seed": 3}, {"cfg_text_scale": 1.0}, {"max_think_tokens": 149}]
    assert compiled_by(tiny, changes, "text2img", PROMPT, known=BRANCHES, **THINKING) == {}


def test_img2img_settings_compile_nothing(small, image):
    """The same for edits, whose guidance has a context more."""
    assert compiled_by(small, DENOISING, "img2img", PROMPT, image, known=BRANCHES, steps=2) == {}
    small.generate("img2img", WARM_UP, image, steps=2)
    with compilations() as compiled:
        small.generate("img2img", AS_LONG, image, steps=2)
    assert compiled == []


@pytest.mark.parametrize("modality", ["text2text", "img2text"])
def test_answers_compile_nothing(small, image, modality):
    """A conversation would stop for a compilation at every question."""
    images = [image] if modality == "img2text" else []
    assert compiled_by(small, DECODING, modality, PROMPT, *images, max_tokens=16) == {}
    small.generate(modality, WARM_UP, *images, max_tokens=16)
    with compilations() as compiled:
        small.generate(modality, AS_LONG, *images, max_tokens=16)
    assert compiled == []


def test_second_model_compiles_nothing(tiny_dir):
    """A model opened again, as the command line does in a test or a server on reload, would compile everything."""
    ask = "text2img", PROMPT
    first = Bagel.load(tiny_dir, dtype="float32").generate(*ask, height=96, width=160, steps=3)
    abstract_weights.cache_clear()  # which is the tests' own (see conftest.py)
    again = Bagel.load(tiny_dir, dtype="float32")
    with compilations() as compiled:
        second = again.generate(*ask, height=96, width=160, steps=3)
    assert compiled == []
    assert np.array_equal(first.latents, second.latents)


def test_mixed_load_compiles_nothing(small, image):
    """Under a steady load of all kinds, new combinations of rows, texts and images are compiled for ever."""

    def load(words: str, number: int):
        turned = Image.open(image).rotate(number)
        ask = [("text2text", words, {"max_tokens": 9}), ("img2text", words, {"max_tokens": 12, "image": turned})]
        ask += [
            ("text2img", words, {"height": 64, "width": 64, "steps": 2}),
            ("text2text", words * 9, {"max_tokens": 5}),
        ]
        made = [Request.create(modality, prompt, **rest) for modality, prompt, rest in ask * 2]
        return [small.prepare(request) for request in made]

    def answer(words: str, number: int) -> None:
        results = [result for _, result in small.run_many(load(words, number))]
        assert len(results) == 8
        assert not [result for result in results if isinstance(result, Exception)]

    # Who meets whom in a step depends on the moment, so it may take a few loads until all has been there.
    quiet = 0
    for number in range(12):
        with compilations() as compiled:
            answer(("a red bench", "two zebras", "a blue clock", "three cats")[number % 4], number)
        quiet = 0 if compiled else quiet + 1
        if quiet == 2:
            break
    assert compiled == []
    assert quiet == 2
    with compilations() as compiled:  # or else nothing is counted in this file
        jax.jit(lambda x: 3 * x + 1)(np.ones(7))
    assert compiled
