"""Conversations: what a turn sees of those before it, and that it computes only what is new."""

from __future__ import annotations

import io

import numpy as np
import pytest
from dense import view_of
from PIL import Image
from small import new_model, random_image

from bagel_jax.engine.session import Session
from bagel_jax.errors import InputError
from bagel_jax.request import MAX_SEED, Request, Result

SIZES = {"height": 32, "width": 24}
STEPS = {"steps": 4}


@pytest.fixture(scope="module")
def made():
    """A model that no other file uses, so that only these conversations are in its prefix cache."""
    model = new_model()
    yield model
    model.close()


@pytest.fixture
def bagel(made):
    """It, with nothing in its prefix cache."""
    made.engine.engine.context.store.prefixes.clear()
    return made


class Answers:
    """Stands in for a model: an image or a text for each request, in no time."""

    def __init__(self):
        self.requests: list[Request] = []
        self.error: Exception | None = None

    def __call__(self, request: Request) -> Result:
        if self.error is not None:
            raise self.error
        self.requests.append(request)
        number = len(self.requests)
        result = Result(request.request_id, request.modality)
        if request.makes_image:
            result.image = random_image(number)
        if request.think or not request.makes_image:
            result.text = f"text {number}"
        return result


@pytest.fixture
def answers() -> Answers:
    return Answers()


def near(ours, theirs) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_edit_of_a_produced_image_equals_that_of_a_given_one(bagel):
    """The produced image is seen otherwise than a given one: by its latents, with other noise, or not at all."""
    session = bagel.session(seed=5)
    first = session.draw("a red bench", **SIZES, **STEPS)
    second = session.draw("make it blue", **STEPS)
    file = io.BytesIO()
    first.image.save(file, "png")
    bagel.engine.engine.context.store.prefixes.clear()
    inputs = ["a red bench", Image.open(file), "make it blue"]
    given = bagel.generate("img2img", inputs=inputs, seed=6, image_seeds=[5], **STEPS)
    assert given.cached_prefix_tokens == 0
    near(second.latents, given.latents)
    assert second.image.size == given.image.size
    unseen = bagel.generate("img2img", inputs=["a red bench", random_image(9, 24, 32), "make it blue"], seed=6, **STEPS)
    assert np.abs(unseen.latents - second.latents).max() > 1e-3


def test_a_fork_of_what_was_found_a_moment_ago():
    """Copies of one step read what none has written yet: the branch without images begins with an unwritten page.

    The full context begins with a copy of a page in the cache, and that branch with a copy of the copy.
    """
    request = Request.create("img2img", inputs=["a red bench", random_image(), "make it blue"], **STEPS)
    fresh, alone = new_model(), new_model(prefix_cache=False)  # pages that were used before may hide it
    fresh.generate("text2img", "a red bench", **SIZES, **STEPS)
    found, computed = (view_of(model.context(request), view=2) for model in (fresh, alone))
    for ours, theirs in zip(found, computed, strict=True):
        near(ours, theirs)


def test_turns_find_what_earlier_turns_computed(bagel):
    """Every turn prefills the whole conversation again."""
    session = bagel.session(seed=1)
    results = [session.draw("a red bench", **SIZES, **STEPS)]
    results += [session.draw(prompt, **STEPS) for prompt in ("make it blue", "make it larger", "and green")]
    plans = [bagel.prepare(request).plan for request in session.requests]
    assert results[0].cached_prefix_tokens == 0
    assert results[0].prefilled_tokens == plans[0].cond.length
    for before, after, result in zip(plans, plans[1:], results[1:], strict=False):
        assert before.cond.length < after.drop_text.length < after.cond.length  # the image's blocks, then the prompt
        assert result.cached_prefix_tokens >= before.cond.length  # all blocks of all images that were there
        new = after.cond.length - before.cond.length + after.drop_image.length - before.drop_image.length
        assert result.prefilled_tokens == new


def test_the_images_blocks_are_found(bagel):
    """An image of two turns ago is encoded and prefilled anew, since its posterior noise is of this turn."""
    session = bagel.session(seed=1)
    session.draw("a red bench", **SIZES, **STEPS)
    session.draw("make it blue", **STEPS)
    third = session.draw("make it larger", **STEPS)
    second = bagel.prepare(session.requests[1])
    blocks = second.plan.drop_text.length - bagel.prepare(session.requests[0]).plan.cond.length
    (rows, columns), vae = second.images[0].vit_grid, second.posterior_noise[0].shape[:2]
    assert blocks == vae[0] // 2 * (vae[1] // 2) + 2 + rows * columns + 2
    assert third.cached_prefix_tokens > blocks
    noise = [bagel.prepare(request).posterior_noise[0] for request in session.requests[1:]]
    np.testing.assert_array_equal(*noise)


def test_the_prefix_cache_changes_nothing(bagel):
    """What a turn finds in the cache is another image's or another seed's."""
    session = bagel.session(seed=3)
    results = [session.draw("a red bench", **SIZES, **STEPS), session.draw("make it blue", **STEPS)]
    results += [session.ask("what is it?", max_tokens=6), session.draw("and green", **STEPS)]
    for request, result in zip(session.requests, results, strict=True):
        bagel.engine.engine.context.store.prefixes.clear()
        alone = bagel.run(request)
        assert alone.cached_prefix_tokens == 0
        assert alone.text == result.text
        if result.latents is not None:
            near(result.latents, alone.latents)


def test_ask_after_draw(bagel):
    """A question does not see the image that was drawn, or prefills the prompt before it again."""
    session = bagel.session(seed=2)
    drawn = session.draw("a red bench", **SIZES, **STEPS)
    answer = session.ask("what is in the image?", max_tokens=6)
    request = session.requests[-1]
    assert request.modality == "img2text"
    assert request.inputs == ("a red bench", drawn.image, "what is in the image?")
    assert session.history == [*request.inputs, answer.text]
    prompt = bagel.prepare(session.requests[0]).plan.cond.length
    assert answer.cached_prefix_tokens == prompt
    assert answer.prefilled_tokens == bagel.prepare(request).plan.cond.length - prompt
    again = session.ask("and now?", max_tokens=2)
    assert again.cached_prefix_tokens == bagel.prepare(request).plan.cond.length


def test_the_plan_of_think_mode_joins_the_history(bagel):
    """The next turn does not see what the model planned."""
    session = bagel.session(seed=4)
    drawn = session.draw("a red bench", think=True, max_think_tokens=4, **SIZES, **STEPS)
    assert drawn.text is not None
    assert session.history == ["a red bench", drawn.text, drawn.image]
    session.draw("make it blue", **STEPS)
    assert session.requests[-1].inputs == ("a red bench", drawn.text, drawn.image, "make it blue")


def test_history(answers):
    """A prompt, an answer, a plan or an image is missing, or out of order, in what a turn sees."""
    session, brought = Session(answers, seed=7), random_image(100)
    asked = session.ask("hello")
    drawn = session.draw("a bench", think=True)
    session.add(brought)
    edited = session.draw("make it blue")
    session.ask("what is it?")
    seen = ["hello", asked.text, "a bench", drawn.text, drawn.image, brought, "make it blue", edited.image]
    ends = 1, 3, 7, 9
    wanted = [*seen, "what is it?"]
    assert [request.inputs for request in answers.requests] == [tuple(wanted[:end]) for end in ends]
    assert [request.modality for request in answers.requests] == ["text2text", "text2img", "img2img", "img2text"]
    assert session.history == [*wanted, "text 4"]
    assert session.requests == answers.requests


def test_seeds(answers):
    """All turns draw the same noise, or an image's posterior sample changes from turn to turn."""
    session = Session(answers, seed=7)
    session.draw("a bench")
    session.add(random_image())
    session.draw("make it blue")
    session.ask("what is it?")
    session.draw("make it green", seed=1)
    session.draw("make it red")
    assert [request.seed for request in answers.requests] == [7, 8, 9, 1, 11]
    seeds = [request.image_seeds for request in answers.requests]
    assert seeds[1:] == [(7, 8), None, (7, 8, 8), (7, 8, 8, 10)]
    assert not seeds[0]
    assert len({request.request_id for request in answers.requests}) == 5


@pytest.mark.parametrize("makes", ["draw", "ask"])
@pytest.mark.parametrize("error", [InputError("no such size"), FloatingPointError("not finite"), KeyboardInterrupt()])
def test_a_failing_turn_leaves_the_session_as_it_was(answers, error, makes):
    """The prompt of a turn that failed, or its seed, is part of the next one."""
    session = Session(answers, seed=7)
    session.draw("a bench")
    before = list(session.history), list(session.requests)
    answers.error = error
    with pytest.raises(type(error)):
        getattr(session, makes)("make it blue")
    answers.error = None
    assert (session.history, session.requests) == before
    session.draw("make it green")
    assert answers.requests[-1].inputs == (*before[0], "make it green")
    assert (answers.requests[-1].seed, answers.requests[-1].image_seeds) == (8, (7,))


@pytest.mark.parametrize("options", [{"steps": 1}, {"no_such": 1}, {"seed": -1}, {"image_seeds": [1]}])
def test_a_turn_that_is_no_request(answers, options):
    """A bad option is found after the session has taken the prompt in."""
    session = Session(answers)
    with pytest.raises((InputError, TypeError)):
        session.draw("a bench", **options)
    assert not session.history
    assert not answers.requests


def test_the_largest_seed(answers):
    """The second turn of a conversation with the largest seed has a seed that there is not, and says so in one word."""
    session = Session(answers, seed=MAX_SEED)
    session.draw("a bench")
    with pytest.raises(InputError, match="seed is"):
        session.draw("make it blue")
    session.draw("make it blue", seed=1)


def test_a_turn_of_this_model_that_fails(bagel):
    """The same with the model: an impossible size is found only there."""
    session = bagel.session()
    with pytest.raises(InputError, match="height is 1000"):
        session.draw("a bench", height=1000)
    assert (session.history, session.requests) == ([], [])
    assert session.draw("a bench", **SIZES, **STEPS).image.size == (24, 32)
