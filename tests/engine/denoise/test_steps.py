"""The denoise loop, and whole requests on a model of toy sizes."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from denoising import Denoising, ticket_of
from dense import view_of
from small import CONFIG, model, new_model, random_image, weights

from bagel_jax.engine.denoise.batch import denoise_batch, denoise_rows
from bagel_jax.engine.denoise.decoder import decode_latents
from bagel_jax.engine.denoise.jobs import DenoiseJob
from bagel_jax.engine.denoise.steps import DenoiseProgram, DenoiseState, denoise, one_step
from bagel_jax.engine.handoff import Lease, Views
from bagel_jax.functional import Context, velocity
from bagel_jax.request import RENORM_TYPES, Request
from bagel_jax.sampling.guidance import combine, guidance
from bagel_jax.sampling.schedule import timesteps

TOKENS, WIDTH = 64, 16
OFF = {"cfg_text_scale": 1.0, "cfg_img_scale": 2.0, "cfg_renorm_type": "global"}
TEXT = {"cfg_text_scale": 4.0, "cfg_img_scale": 1.0, "cfg_renorm_type": "global"}
BOTH = {"cfg_text_scale": 4.0, "cfg_img_scale": 2.0, "cfg_renorm_type": "text_channel"}


def edit(steps=6, interval=(0.0, 1.0), **settings):
    """A prepared edit."""
    settings |= {"steps": steps, "cfg_interval": interval, "timestep_shift": 3.0}
    return model().prepare(Request.create("img2img", "a red bench", random_image(), request_id="edit", **settings))


@pytest.fixture(scope="module")
def context():
    """The contexts of an edit: three views."""
    made = new_model().context(edit())
    assert (len(made.length), made.drop_text, made.drop_image) == (3, 1, 2)
    return made


@pytest.fixture(scope="module")
def apart(context):
    """The same with pages for each view alone, so that each can be poisoned alone."""
    table = np.asarray(context.page_table)
    return dataclasses.replace(
        context,
        pages=jnp.concatenate([context.pages[:, numbers] for numbers in table], axis=1),
        page_table=np.arange(table.size, dtype=np.int32).reshape(table.shape),
    )


def run(context, g, steps=6, interval=(0.0, 1.0), stops=None):
    """Latents after each stop."""
    one, seen = Denoising(model(), (edit(steps, interval, **g), context)), []
    for stop in stops or [steps - 1]:
        one.advance(stop - one.jobs[0].done)
        assert one.jobs[0].done == stop
        seen.append(one.latents())
    return seen


def with_view(context, view, change):
    """Contexts apart, with other values in one view's pages."""
    numbers = np.asarray(context.page_table[view])
    pages = context.pages.at[:, numbers].set(change(context.pages[:, numbers]))
    return dataclasses.replace(context, pages=pages)


def poisoned(context, view):
    """The contexts with NaN in place of one view's pages."""
    return with_view(context, view, lambda pages: jnp.full_like(pages, jnp.nan))


def plain_loop(context, prepared):
    """What the loop does, in plain Python, one branch at a time, without pages or padding."""
    s, one_branch = prepared.request.settings, partial(velocity, *model().functional())
    g, points = guidance(s), timesteps(s.steps, s.timestep_shift)
    latents, seen = prepared.initial_latent, []
    for t, following in itertools.pairwise(points):
        branches = [
            one_branch(latents, t, Context(*view_of(context, view), int(rope)), prepared.latent_grid)
            for view, rope in enumerate(context.rope)
        ]
        v = np.asarray(branches[0])
        if s.cfg_interval[0] < t <= s.cfg_interval[1] and g.text_scale > 1:
            v = np.asarray(combine(v, branches[context.drop_text], branches[context.drop_image], g))
        latents = latents - v * (t - following)
        seen.append(latents)
    return seen


@pytest.mark.parametrize("g", [OFF, TEXT, BOTH], ids=["off", "text", "both"])
def test_compiled_loop_equals_a_plain_one(context, g):
    """The compiled loop takes another timestep, step width or branch than the definition, at any step."""
    interval = (0.5, 1.0)  # on for the first steps only
    ours = run(context, g, 6, interval, stops=range(1, 6))
    for step, wanted in zip(ours, plain_loop(context, edit(6, interval, **g)), strict=True):
        np.testing.assert_allclose(step, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", RENORM_TYPES)
def test_a_image_smaller_than_its_program_equals_a_plain_one(kind):
    """Latents are padded to few sizes, and an image depends on how far: padding is attended, or counts in a norm."""
    options = {"steps": 4, "height": 16, "width": 24, "cfg_text_scale": 9.0, "cfg_renorm_type": kind}
    prepared = model().prepare(Request.create("text2img", "a blue clock", request_id="small", **options))
    context = new_model().context(prepared)
    one = Denoising(model(), (prepared, context))
    assert one.state.latents.shape[1] > len(prepared.initial_latent)
    one.advance(3)
    np.testing.assert_allclose(one.latents(), plain_loop(context, prepared)[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("g", [OFF, BOTH], ids=["off", "both"])
def test_one_call_equals_single_evaluations(context, g):
    """Several evaluations in one call take another timestep or width than the same ones after each other."""
    one = Denoising(model(), (edit(6, (0.5, 1.0), **g), context))
    for done, wanted in enumerate(run(context, g, 6, (0.5, 1.0), stops=range(1, 6)), 1):
        velocity, before = one.evaluate()[0], one.latents()
        assert one.jobs[0].done == done
        assert np.abs(velocity).max() > 1e-2
        np.testing.assert_allclose(before, wanted, rtol=1e-4, atol=1e-5)
    at_once = run(context, g, 6, (0.5, 1.0))[-1]
    np.testing.assert_allclose(at_once, one.latents(), rtol=1e-4, atol=1e-5)


def test_in_pieces_or_at_once(context):
    """A watched request, run step by step, makes another image than an unwatched one."""
    at_once = run(context, BOTH)[-1]
    for stops in (range(1, 6), (2, 5), (5,)):
        np.testing.assert_array_equal(run(context, BOTH, stops=stops)[-1], at_once)


def test_a_stop_already_reached_does_nothing(context):
    """A request that is asked to stop where it stands takes one more step."""
    one = Denoising(model(), (edit(**BOTH), context))
    one.advance(3)
    before = one.latents()
    one.call(0)
    np.testing.assert_array_equal(one.latents(), before)


@pytest.mark.parametrize("view", [1, 2])
def test_branches_that_are_off_do_not_matter(apart, view):
    """A branch gets into the image at steps at which it is off."""
    clean, dirty = apart, poisoned(apart, view)
    cases = [(OFF, (0.0, 1.0)), (BOTH, (0.0, 0.0)), (BOTH, (1.0, 1.0))]
    if view == 2:
        half = {"cfg_text_scale": 4.0, "cfg_img_scale": 0.5, "cfg_renorm_type": "channel"}
        cases += [(TEXT, (0.0, 1.0)), (half, (0.0, 1.0))]
    for g, interval in cases[: 2 if view == 1 else None]:
        np.testing.assert_array_equal(run(dirty, g, 4, interval)[-1], run(clean, g, 4, interval)[-1])
    # The poison does work.
    assert np.isnan(run(dirty, BOTH, 4)[-1]).all()


def test_branches_are_off_at_single_steps(apart):
    """A branch gets into the image at all steps if it is on at one."""
    interval = (0.0, 0.7)  # of t = 1, 0.857, 0.6, 0: on at the last
    seen = run(poisoned(apart, 1), BOTH, 4, interval, stops=(1, 2, 3))
    assert [bool(np.isnan(x).any()) for x in seen] == [False, False, True]


class Counting:
    """Stands in for the model, and notes how many rows are computed."""

    def __init__(self):
        self.rows = []

    def noised_hidden(self, latents, *args):
        self.rows.append(latents.shape[0])
        return latents, args[-1]

    def velocity(self, hidden):
        return hidden


@pytest.mark.parametrize(
    ("drop_text", "drop_image", "wanted"),
    [
        (1, 2, [1, 1, 2, 3]),  # an edit
        (1, 0, [1, 1, 2, 2]),  # text2img: the context without images is the full one
        (0, 1, [1, 1, 1, 2]),  # a prompt that ends in an image
        (0, 0, [1, 1, 1, 1]),
    ],
)
def test_branches_that_are_off_are_not_computed(drop_text, drop_image, wanted):
    """Every step costs as much as a guided one."""
    counting, views = Counting(), max(drop_text, drop_image) + 1
    zeros = np.zeros(views, np.int32)
    lease = Lease(None, Views("edit", (32, 32), drop_text, drop_image, zeros, zeros), [[0]] * views)
    state = DenoiseState(jnp.zeros((1, TOKENS, WIDTH)), jnp.zeros((1, 1, 1, 2, 16, 1)), None)
    for g, interval in ((BOTH, (0.0, 0.0)), (OFF, (0.0, 1.0)), (TEXT, (0.0, 1.0)), (BOTH, (0.0, 1.0))):
        job = DenoiseJob.create(ticket_of(edit(4, interval, **g)), lease)
        job.page_table = zeros[:, None]
        batch, rows = denoise_batch([job], 1, TOKENS, CONFIG, np.zeros(2, np.int32)), denoise_rows([job], 1)
        one_step(counting, DenoiseProgram(None, "xla", TOKENS), state, 0, batch, rows, None)
    assert counting.rows == wanted


def test_regression_2_16_guidance_contexts_matter(apart):
    """Only one of the three contexts arrives, and guidance is silently off."""
    plain = run(apart, BOTH)[-1]
    for view in range(3):
        other = with_view(apart, view, lambda pages: pages[..., ::-1] * 0.5)
        assert np.abs(run(other, BOTH)[-1] - plain).max() > 1e-3
    assert np.abs(run(apart, OFF)[-1] - plain).max() > 1e-2
    assert np.abs(run(apart, TEXT)[-1] - plain).max() > 1e-2


@pytest.mark.parametrize("field", ["length", "rope"])
@pytest.mark.parametrize("view", [0, 1, 2])
def test_every_view_has_its_own_place(apart, field, view):
    """A branch uses another branch's length or RoPE position."""
    values = getattr(apart, field) - np.eye(3, dtype=np.int32)[view]
    other = dataclasses.replace(apart, **{field: values})
    assert np.abs(run(other, BOTH, 3)[-1] - run(apart, BOTH, 3)[-1]).max() > 1e-6


@pytest.mark.parametrize("rubbish", [1e4, np.nan])
def test_regression_4_nothing_past_the_context_is_seen(apart, rubbish):
    """A context handed over past its real length: pure noise."""
    other = apart
    for view, length in enumerate(apart.length.tolist()):
        size = apart.pages.shape[4]
        real = np.arange(apart.page_table.shape[1] * size).reshape(-1, size) < length  # [m, page]
        keep = real[None, :, None, None, :, None]
        other = with_view(other, view, lambda pages, keep=keep: jnp.where(keep, pages, rubbish))
    np.testing.assert_array_equal(run(other, BOTH)[-1], run(apart, BOTH)[-1])


def test_other_settings_compile_nothing(context):
    """Another scale, shift, interval or number of steps compiles for a minute; only a number of rows may."""
    run(context, BOTH, interval=(0.5, 1.0))  # three rows, then one
    before = denoise._cache_size()
    other = {"cfg_text_scale": 7.0, "cfg_img_scale": 1.2, "cfg_renorm_type": "channel", "cfg_renorm_min": 0.5}
    run(context, other, 9, (0.2, 0.8))
    run(context, OFF, 2)
    assert denoise._cache_size() == before


def test_who_else_is_denoised_changes_nothing(context):
    """An image depends on size, settings or progress of those that it is denoised with."""
    small = Request.create("text2img", "a blue clock", steps=3, height=16, width=24, cfg_text_scale=9.0)
    longer = Request.create("text2img", "one two", steps=9, seed=3, cfg_renorm_type="channel")
    others = [model().prepare(request) for request in (small, longer)]
    fresh = new_model()
    mixed = [(edit(6, (0.5, 1.0), **BOTH), context)]
    mixed += [(one, fresh.context(one)) for one in others]
    together = Denoising(model(), *mixed)
    while together.busy:
        together.advance(1)
    for slot, one in enumerate(mixed):
        alone = Denoising(model(), one)
        alone.advance(alone.jobs[0].total)
        np.testing.assert_allclose(together.latents(slot), alone.latents(), rtol=1e-4, atol=1e-4)


def test_decoder_puts_tokens_in_their_place():
    """An image comes out turned, or cut into tiles in the wrong order."""
    tokens = np.zeros((8, WIDTH), np.float32)
    drawn = np.random.RandomState(0).standard_normal((8, WIDTH)).astype(np.float32)

    def decoded(*images):
        cells, sizes = np.stack(images).reshape(len(images), 2, 4, WIDTH), np.full((len(images), 2), (2, 4), np.int32)
        return np.asarray(decode_latents(weights().skeleton, weights().arrays, cells, sizes))

    both = decoded(tokens, drawn)
    assert both.shape == (2, 8, 16, 3)
    for pixels, latents in zip(both, (tokens, drawn), strict=True):
        (alone,) = decoded(latents)
        np.testing.assert_allclose(pixels, alone, rtol=1e-4, atol=1e-5)
    one = weights().model().unpatchify_latents(jnp.asarray(tokens).at[6, 5].set(1.0), 2, 4)
    # Token 6 of 2 x 4 is at row 1, column 2; number 5 of it at row 0, column 1 of its 2 x 2 cells, channel 1.
    assert np.argwhere(np.asarray(one)).tolist() == [[2, 5, 1]]
    back = weights().model().patchify_latents(one)
    np.testing.assert_array_equal(back, np.asarray(tokens + (np.arange(128).reshape(8, 16) == 6 * 16 + 5)))


# Whole requests.


def latents(modality, *args, on=None, steps=4, **kwargs):
    return (on or model()).generate(modality, *args, steps=steps, **kwargs).latents


@pytest.mark.parametrize("modality", ["text2img", "img2img"])
def test_regression_3_the_prompt_matters(modality):
    """The same image comes out whatever the prompt, because the context never arrived."""
    image = random_image() if modality == "img2img" else None
    first, second = (latents(modality, prompt, image, seed=3) for prompt in ("a red bench", "a blue clock"))
    assert np.abs(first - second).max() > 1e-3
    plain = [latents(modality, prompt, image, seed=3, cfg_text_scale=1.0) for prompt in ("a red bench", "a blue clock")]
    assert np.abs(plain[0] - plain[1]).max() > 1e-3


def test_regression_3_the_image_matters():
    """An edit knows nothing of its image."""
    first, second = (latents("img2img", "a red bench", random_image(seed), seed=3) for seed in (0, 1))
    assert np.abs(first - second).max() > 1e-3


def test_inputs_that_matter():
    """Seed, negative prompt or thought have no effect on the image."""
    plain = latents("text2img", "a red bench")
    assert np.abs(latents("text2img", "a red bench", seed=1) - plain).max() > 1e-1
    assert np.abs(latents("text2img", "a red bench", negative_prompt="a blue clock") - plain).max() > 1e-3
    thought = latents("text2img", "a red bench", think=True, max_think_tokens=5)
    assert np.abs(thought - plain).max() > 1e-3


def everything(on):
    """One request of each kind: text and latents."""
    image = random_image()
    results = [
        on.generate("text2img", "a red bench", steps=4),
        on.generate("img2img", "a red bench", image, steps=4),
        on.generate("text2text", "a red bench", max_tokens=12),
        on.generate("img2text", "a red bench", image, max_tokens=12),
        on.generate("text2img", "a red bench", think=True, max_think_tokens=6, steps=4),
    ]
    return [(r.text, r.latents) for r in results]


def assert_same(ours, theirs) -> None:
    """Up to rounding, since what is in the prefix cache may have been computed in a chunk of another length."""
    for (text, mine), (other_text, other) in zip(ours, theirs, strict=True):
        assert text == other_text
        assert (mine is None) == (other is None)
        if mine is not None:
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


def test_regression_7_nothing_leaks_into_later_requests():
    """After an edit, plain questions are answered with ""; a request's image depends on those before it."""
    first = everything(model())
    latents("img2img", "other", random_image(5), seed=9, cfg_img_scale=3.0, cfg_renorm_type="global")
    latents("text2img", "other words here", think=True, max_think_tokens=9, steps=7)
    model().generate("text2text", "something long " * 20, max_tokens=30, do_sample=True, seed=4)
    assert_same(everything(model()), first)
    assert first[2][0]


def test_regression_6_the_first_request_is_like_any_other():
    """State of the warm-up, or of compiling, gets into the first real request."""
    settled = everything(model())
    assert_same(everything(new_model()), settled)


def test_regression_10_evaluations_are_counted():
    """The bar promises, and the model makes, one evaluation too many."""
    seen = []

    def progress(phase, done, total):
        if phase == "denoise":
            seen.append((done, total))

    watched = model().generate("text2img", "a", steps=4, progress=progress)
    # How many evaluations a call makes depends on how fast they are.
    assert (seen[0], seen[-1]) == ((0, 3), (3, 3))
    assert seen == sorted(set(seen))
    assert {total for _, total in seen} == {3}
    np.testing.assert_array_equal(watched.latents, latents("text2img", "a"))


def test_regression_11_two_steps():
    """The smallest number of steps ends in NaN."""
    assert np.isfinite(latents("img2img", "a", random_image(), steps=2)).all()
    assert np.isfinite(latents("text2img", "a", steps=2, cfg_interval=(0.0, 0.0))).all()


def test_regression_30_given_noise_is_used():
    """Noise that was given is not what denoising starts from: images cannot be compared between programs."""
    prepared = model().prepare(Request.create("img2img", "a", random_image(), seed=8))
    given = {"latent": prepared.initial_latent, "vae_0": prepared.posterior_noise[0].transpose(2, 0, 1)[None]}
    own = latents("img2img", "a", random_image(), seed=8)
    np.testing.assert_array_equal(latents("img2img", "a", random_image(), seed=1, init_noise=given), own)
    assert np.abs(latents("img2img", "a", random_image(), seed=1) - own).max() > 1e-1


def test_latents_that_are_not_finite_are_an_error():
    """A black image is written as if all were well."""
    huge = {"latent": np.full((TOKENS, WIDTH), 3e38, np.float32)}
    with pytest.raises(FloatingPointError, match="not finite"):
        latents("text2img", "a", init_noise=huge, cfg_text_scale=1e4)
