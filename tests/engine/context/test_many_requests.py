"""Many requests at once through few pages: each must come out as if it were alone, and no page be lost."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import view_of
from serving import Served, cancel, poison, prefilled, serve, step, submit, turn
from small import CONFIG, model, new_stage, random_image, weights

from bagel_jax.engine.context.stage import ContextStage
from bagel_jax.engine.core import Engine
from bagel_jax.engine.ticket import CONTEXT, Collect, Done, Run, Submit
from bagel_jax.errors import InputError
from bagel_jax.layout import ImageGrids, Text, contexts, plan
from bagel_jax.placement.placement import Placement
from bagel_jax.request import Request
from bagel_jax.settings import EngineConfig

VAE, VIT = (8, 8), (4, 4)


def text_of(generator, longest: int) -> Text:
    """Random tokens, long or short with equal chance."""
    length = int(np.exp(generator.uniform(0, np.log(longest)))) if generator.random() < 0.5 else None
    length = length or int(generator.integers(1, longest + 1))
    return Text(tuple(generator.integers(0, 700, length).tolist()))


def random_request(generator, i: int, longest: int):
    """Any modality, texts of any length before and behind images, of which there are few different ones."""
    modality = ("text2text", "img2text", "text2img", "img2img")[generator.integers(4)]
    makes_image = modality.endswith("img")
    images = [random_image(int(generator.integers(3)))] if modality.startswith("img") else []
    think = makes_image and generator.random() < 0.3
    most = int(generator.integers(1, 60))
    limit = {"max_think_tokens": most} if think else {} if makes_image else {"max_tokens": most}
    if not makes_image or think:
        limit["do_sample"] = bool(generator.random() < 0.5)
        limit["text_temperature"] = 1.0
    made = model().prepare(
        Request.create(
            modality,
            inputs=[*images, "a"],
            think=think,
            seed=int(generator.integers(2)),
            request_id=f"request-{i}",
            **limit,
        )
    )
    system = None if not think else made.plan.sequences[0].compute[0].segment
    images = [ImageGrids(0, VIT, VAE if makes_image else None)] if images else []
    inputs = [text_of(generator, longest), *images] if generator.random() < 0.5 else [*images]
    inputs.append(text_of(generator, longest))
    return dataclasses.replace(made, plan=plan(contexts(inputs, system=system)))


def same(ours: Served, theirs: Served) -> None:
    assert isinstance(ours, Served), ours
    assert ours.ids == theirs.ids
    if theirs.context is None:
        assert ours.context is None
        return
    np.testing.assert_array_equal(ours.context.length, theirs.context.length)
    np.testing.assert_array_equal(ours.context.rope, theirs.context.rope)
    about = [(c.request_id, c.image_shape, c.drop_text, c.drop_image) for c in (ours.context, theirs.context)]
    assert about[0] == about[1]
    for view in range(len(theirs.context.length)):
        for x, y in zip(view_of(ours.context, view), view_of(theirs.context, view), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4)


def nothing_lost(stage: ContextStage) -> None:
    assert not stage.busy
    stage.store.check()
    stage.store.prefixes.clear()
    assert stage.store.pool.num_free == stage.store.pool.num_pages


def check(count: int, longest: int, seed: int, **settings) -> dict[str, Served | Exception]:
    """Random requests together, against each alone."""
    generator = np.random.default_rng(seed)
    requests = [random_request(generator, i, longest) for i in range(count)]
    stage = new_stage(**settings)
    poison(stage)
    together = serve(stage, *requests)
    nothing_lost(stage)
    alone = new_stage(prefix_cache=False, num_pages=400)
    for one in requests:
        (wanted,) = serve(alone, one).values()
        same(together[one.request.request_id], wanted)
    nothing_lost(alone)
    return together


@pytest.mark.parametrize(
    "settings",
    [
        {"num_pages": 66, "ar_max_num_seqs": 8, "page_size": 16, "max_num_batched_tokens": 64},
        pytest.param({"num_pages": 24, "ar_max_num_seqs": 5, "max_num_batched_tokens": 200}, marks=pytest.mark.slow),
        pytest.param({"num_pages": 24, "ar_max_num_seqs": 8, "prefix_cache": False}, marks=pytest.mark.slow),
    ],
    ids=["small pages", "usual", "no prefix cache"],
)
def test_regressions_1_7_32_few_requests(settings):
    """A request's result is another's, or depends on what shares its batch, its pages, or on what came before."""
    check(12, 200, seed=5, **settings)


@pytest.mark.slow
def test_regressions_1_7_32_many_requests():
    """The same, at length: 60 requests of up to 2,000 tokens a text through a pool too small for all."""
    together = check(60, 2000, seed=1, num_pages=120, ar_max_num_seqs=16, max_num_batched_tokens=1024)
    assert any(event.preempted for event in together.values())
    assert sum(event.result.cached_prefix_tokens for event in together.values()) > 0


@pytest.mark.parametrize("modality", ["img2text", "img2img"])
def test_regression_25_images_of_different_sizes(modality):
    """A batch with images of different sizes crashes, or one of them is cut."""
    sizes = (40, 40), (64, 32), (30, 90), (200, 200)
    made = [
        model().prepare(
            Request.create(
                modality,
                "a red bench",
                random_image(i, *size),
                request_id=f"{i}",
                **({"max_tokens": 6} if modality == "img2text" else {}),
            )
        )
        for i, size in enumerate(sizes)
    ]
    assert len({one.images[0].vit_grid for one in made}) > 1
    stage = new_stage()
    together = serve(stage, *made)
    nothing_lost(stage)
    for one in made:
        (alone,) = serve(new_stage(), one).values()
        same(together[one.request.request_id], alone)


def test_regression_6_the_first_request_is_like_any_other():
    """What warming up leaves in the pages gets into the first real request."""
    made = question(0, max_tokens=12)
    stage = new_stage(prefix_cache=False)
    first, *others = (serve(stage, made)["q0"].ids for _ in range(3))
    assert others == [first, first]


def question(i: int, words: int = 30, **settings):
    prompt = " ".join(f"word{i}" for _ in range(words))
    return model().prepare(Request.create("text2text", prompt, request_id=f"q{i}", **settings))


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_a_cancelled_request_frees_its_pages(after):
    """Who hangs up keeps his pages for ever, or takes those of others along."""
    stage = new_stage(num_pages=40, max_num_batched_tokens=32, ar_max_num_seqs=2)
    made = [question(i, max_tokens=20) for i in range(4)]
    wanted = serve(new_stage(), *made)
    tickets = [submit(stage, one) for one in made]
    for _ in range(after):
        stage.run(0.0)
        if len(stage.calls) > 1:  # so that in most cases there is one in flight
            stage.collect(0.0)
    cancel(stage, tickets[1])  # in work
    cancel(stage, tickets[3])  # still waiting
    cancel(stage, tickets[3])
    while stage.busy:
        turn(stage)
    ended = {ticket.request_id: ticket.context.ids for ticket in tickets if ticket.context.ids is not None}
    assert ended == {key: wanted[key].ids for key in ("q0", "q2")}
    nothing_lost(stage)


def test_cancelled_sharers_let_go_too():
    """A request cancelled between its contexts, whose pages are shared, loses or frees some twice."""
    made = model().prepare(
        Request.create("img2img", inputs=["a red", random_image(), "a blue clock"], request_id="edit")
    )
    for after in range(4):
        stage = new_stage(max_num_batched_tokens=32, prefix_cache=after % 2 == 0)
        ticket = submit(stage, made)
        for _ in range(after):
            step(stage)
        cancel(stage, ticket)
        nothing_lost(stage)


def test_what_can_never_fit_is_refused():
    """A request larger than the pool waits for ever, and everybody behind it too."""
    stage = new_stage(num_pages=5)
    with pytest.raises(
        InputError, match=r"may need 10 pages of 64 tokens and the KV cache has 4; raise num_pages to 11"
    ):
        submit(stage, question(0, max_tokens=500))
    with pytest.raises(InputError, match="may need 32882 tokens of context; at most 32768"):
        submit(new_stage(), question(0, max_tokens=32760))
    fits = question(0, max_tokens=20)
    assert serve(stage, fits)["q0"].ids == serve(new_stage(), fits)["q0"].ids
    nothing_lost(stage)


def test_an_id_is_taken_once():
    """Two requests of one id get each other's tokens."""
    place = Placement.on(jax.devices()[0])
    engine = Engine((weights(), weights()), (place, place), CONFIG, jnp.float32, model().tokenizer, EngineConfig())
    made = question(0, max_tokens=3)
    engine.step([Submit(made)])
    with pytest.raises(RuntimeError, match="'q0' is in work already"):
        engine.step([Submit(made)])
    done = []
    while not done:
        done = [event for event in engine.step([Run(CONTEXT), Collect(CONTEXT)]) if isinstance(event, Done)]
    assert done[0].outcome.decoded_tokens == 3
    engine.step([Submit(made)])


def test_preempted_requests_go_on_where_they_were():
    """A request that gave way starts its answer anew, so that its listener hears tokens twice."""
    made = [question(i, words=12, max_tokens=120) for i in range(3)]
    wanted = {key: event.ids for key, event in serve(new_stage(), *made).items()}
    stage = new_stage(num_pages=16, page_size=16, prefix_cache=False)
    together = serve(stage, *made)  # which compares what is heard with what comes out
    assert any(event.preempted for event in together.values())
    assert {key: event.ids for key, event in together.items()} == wanted
    nothing_lost(stage)


def test_short_answers_do_not_wait_for_long_prompts():
    """A long prompt holds up everybody who is decoding until all of it is prefilled."""
    stage = new_stage(max_num_batched_tokens=32, ar_max_num_seqs=4)
    job = prefilled(stage, question(0, words=4, max_tokens=200))
    submit(stage, question(1, words=150, max_tokens=2))
    for _ in range(6):
        before = len(job.sequences[0].tail)
        step(stage)
        assert len(job.sequences[0].tail) == before + 1
    assert stage.scheduler.running[1].sequences[0].missing  # still prefilling
    while stage.busy:
        turn(stage)
    nothing_lost(stage)
