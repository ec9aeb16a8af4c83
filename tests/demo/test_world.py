"""The demo world: its images, its words, and what is held out of it."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from random import Random

import numpy as np
import pytest

from bagel_jax.errors import InputError
from tools.demo import world
from tools.demo.world import COLORS, COMBINATIONS, SHAPES, Combination, Edit, Scene

RED_CIRCLE = Combination("red", "circle", "white")


def test_combinations():
    """Held-out numbers would be of another world, or of combinations that a model was trained on."""
    assert len(set(COMBINATIONS)) == 224
    assert all(c.color != c.ground for c in COMBINATIONS)
    held = [c for c in COMBINATIONS if world.held_out(*c)]
    assert held == [c for c in COMBINATIONS if int(hashlib.sha1(" ".join(c).encode()).hexdigest(), 16) % 7 == 0]
    assert len(held) == 33
    # Every single attribute, and every shape in every colour, is still trained on.
    trained = set(COMBINATIONS) - set(held)
    assert {(c.color, c.shape) for c in trained} == {(color, shape) for color in COLORS for shape in SHAPES}
    assert {(c.shape, c.ground) for c in trained} == {(shape, ground) for ground in COLORS for shape in SHAPES}
    assert not world.held_out(None, "circle", "white")


@pytest.mark.parametrize(
    ("shape", "area", "inside", "outside"),
    [
        ("circle", math.pi, [(0.65, 0.65), (0, -0.9)], [(0.8, 0.8)]),
        ("square", 2, [(0.65, 0.65), (-0.65, 0.65)], [(0, -0.8), (0.8, 0)]),
        ("triangle", 3 * 3**0.5 / 4, [(0, -0.8), (0.7, 0.4), (-0.7, 0.4)], [(0, 0.6), (0.5, -0.5)]),
        ("star", 1.1226, [(0, -0.8), (0.75, -0.25), (0.45, 0.62), (0, 0.25)], [(0, 0.55), (0.5, -0.6)]),
    ],
)
def test_shapes(shape, area, inside, outside):
    """Upright, on their circumcircle, where the scene says: else sizes and places would be judged wrongly."""
    radius, x, y = 20.0, 30.0, 34.0
    mask = world.coverage(shape, radius, x, y)
    assert mask.shape == (64, 64)
    assert mask.sum() == pytest.approx(area * radius**2, rel=0.03)
    rows, columns = np.mgrid[:64, :64] + 0.5
    assert (mask * columns).sum() / mask.sum() == pytest.approx(x, abs=0.15)
    assert (mask * rows).sum() / mask.sum() == pytest.approx(y, abs=0.15)
    assert np.hypot(columns - x, rows - y)[mask > 0].max() == pytest.approx(radius, abs=1.0)
    for wanted, points in ((1, inside), (0, outside)):
        for u, v in points:
            assert mask[int(y + radius * v), int(x + radius * u)] == wanted


def test_image_has_smooth_edges():
    """Colours are exact away from the edge, and mixed on it."""
    image = world.draw(Scene("circle", (255, 0, 0), (255, 255, 255), 15.3, 30, 31))
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    counts = Counter(map(tuple, image.reshape(-1, 3).tolist()))
    (ground, _), (color, _) = counts.most_common(2)
    assert (ground, color) == ((255, 255, 255), (255, 0, 0))
    assert sum(counts.values()) - counts[ground] - counts[color] > 30


def test_scenes_lie_in_the_image():
    """A shape cut off at the border has no centre to be judged by."""
    rng = Random(0)
    for c in COMBINATIONS:
        scene = Scene.of(c, rng)
        assert scene.combination == c
        assert 12 <= scene.radius <= 22
        for place in (scene.x, scene.y):
            assert scene.radius + 1 <= place <= 63 - scene.radius
    image = world.draw(Scene("circle", (255, 0, 0), (0, 0, 0), 22, 23, 41))
    assert not image[[0, -1]].any()
    assert not image[:, [0, -1]].any()


def test_drawing_is_quick():
    """Sixty thousand images are drawn before a training."""
    scene = Scene.of(RED_CIRCLE, Random(0))
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(20):
            world.draw(scene)
        best = min(best, (time.perf_counter() - started) / 20)
    assert best < 2e-3  # 0.15 ms on an idle machine


def test_sentences():
    """The forms by which a trained model is judged."""
    assert world.caption(RED_CIRCLE) == "a red circle on a white background"
    assert world.caption(Combination("orange", "star", "black")) == "an orange star on a black background"
    assert world.caption(Combination("blue", "square", "orange")) == "a blue square on an orange background"
    assert world.prompts(RED_CIRCLE)[0] == world.caption(RED_CIRCLE)
    assert world.plan(RED_CIRCLE) == "<think>a circle, red, on white</think>"
    assert [(q.forms[0], q.answer(RED_CIRCLE)) for q in world.QUESTIONS.values()] == [
        ("What is in this image?", "a red circle on a white background"),
        ("What color is the shape?", "red"),
        ("What shape is it?", "circle"),
        ("What color is the background?", "white"),
        ("Describe the shape.", "a red circle"),
        ("Describe the color and the background.", "red on white"),
        ("Describe the shape and the background.", "a circle on a white background"),
    ]


def test_nothing_is_said_of_a_nameless_color():
    """Answers of "None" would be learnt."""
    answers = {kind: q.answer(Combination(None, "star", "red")) for kind, q in world.QUESTIONS.items()}
    assert {kind for kind, answer in answers.items() if answer is not None} == {"shape", "ground", "shape and ground"}
    assert all(q.answer(Combination(None, "star", None)) is None for k, q in world.QUESTIONS.items() if k != "shape")


def test_facts():
    """Two answers to one question cannot both be learnt."""
    facts = list(world.facts())
    questions = [form for fact in facts for form in fact.forms]
    assert len(questions) == len(set(questions))
    answers = {fact.forms[0]: fact.answer for fact in facts}
    assert len(world.CAPITALS) == len(set(world.CAPITALS.values())) == 50
    assert answers["What is the capital of France?"] == "The capital of France is Paris."
    assert answers["Which shape has three sides?"] == "A triangle has three sides."
    assert answers["What do you get when you mix blue and yellow?"] == "Blue and yellow make green."
    assert answers["What do you get when you mix yellow and blue?"] == "Yellow and blue make green."


@pytest.mark.parametrize(
    ("edit", "instruction", "after"),
    [
        (Edit(color="blue"), "make it blue", ("blue", "circle", "white")),
        (Edit(shape="square"), "turn it into a square", ("red", "square", "white")),
        (Edit(ground="green"), "change the background to green", ("red", "circle", "green")),
        (Edit(color="yellow", shape="star"), "make it a yellow star", ("yellow", "star", "white")),
        (Edit(color="orange", shape="star"), "make it an orange star", ("orange", "star", "white")),
    ],
)
def test_edit(edit, instruction, after):
    """What is not named stays: size, place, and colours to the last bit."""
    assert edit.instruction == edit.forms[0] == instruction
    assert edit.result(RED_CIRCLE) == after
    before = Scene.of(RED_CIRCLE, Random(0))
    scene = edit.apply(before)
    assert scene.combination == after
    assert (scene.radius, scene.x, scene.y) == (before.radius, before.x, before.y)
    nameless = Scene("circle", (10, 200, 130), (200, 20, 150), 15, 30, 30)
    scene = edit.apply(nameless)
    assert edit.color or scene.color == nameless.color
    assert edit.ground or scene.ground == nameless.ground
    assert edit.shape or scene.shape == "circle"


def test_edits_change_something():
    """An edit into the ground's colour would make the shape vanish, and one into itself shows nothing."""
    assert len(world.edits(RED_CIRCLE)) == 6 + 3 + 6 + 18
    for c in COMBINATIONS:
        results = [edit.result(c) for edit in world.edits(c)]
        assert len(results) == len(set(results))
        assert set(results) <= set(COMBINATIONS) - {c}
    assert {edit.kind for edit in world.edits(RED_CIRCLE, "color and shape")} == {"color and shape"}


def test_nameless_colors_keep_their_distance():
    """One that looks like red would teach that red has no name."""
    rng = Random(0)
    for other in COLORS.values():
        color = world.nameless_color(rng, other)
        named = [*COLORS.values(), *world.NEW_COLORS.values()]
        assert min(world.distance(color, value) for value in named) >= world.CLEARLY_APART
    pairs = [(a, b) for a in COLORS.values() for b in COLORS.values() if a != b]
    assert min(world.distance(a, b) for a, b in pairs) == world.CLEARLY_APART


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Edit(),
        lambda: Edit(color="blue", ground="red"),
        lambda: Edit(color="mauve"),
        lambda: world.draw(Scene("heart", (0, 0, 0), (9, 9, 9), 15, 30, 30)),
        lambda: Scene.of(Combination("mauve", "star", "red"), Random(0)),
        lambda: world.edits(RED_CIRCLE, "size"),
    ],
)
def test_bad_input(bad):
    """One sentence, not a traceback from within."""
    with pytest.raises(InputError):
        bad()
