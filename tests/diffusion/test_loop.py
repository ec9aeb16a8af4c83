"""The denoise loop, and whole requests on a model of toy sizes."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from serving import serve
from small import CONFIG, model, new_model, new_stage, picture, weights

from bagel_jax.diffusion.guidance import combine, guidance
from bagel_jax.diffusion.loop import Canvas, DenoiseState, decode_latents, denoise, guided_velocity
from bagel_jax.diffusion.schedule import schedule, timesteps
from bagel_jax.handoff import ContextKV
from bagel_jax.inputs.prepare import latent_positions
from bagel_jax.models.attention import KV
from bagel_jax.models.mot import Prefix
from bagel_jax.request import Request

TOKENS, WIDTH = 64, 16
OFF = guidance(1.0, 2.0, "global", 0.0)
TEXT = guidance(4.0, 1.0, "global", 0.0)
BOTH = guidance(4.0, 2.0, "text_channel", 0.0)


@pytest.fixture(scope="module")
def context():
    """The contexts of an edit: three rows over two caches."""
    prepared = model().prepare(Request.create("img2img", "a red bench", picture()))
    (finished,) = serve(new_stage(), prepared).values()
    made = finished.context
    assert (made.rows, made.text_row, made.img_row) == ((0, 0, 1), 1, 2)
    return made


@pytest.fixture(scope="module")
def apart(context):
    """The same with a cache for each row, so that each can be poisoned alone."""
    caches = tuple(context.caches[row] for row in context.rows)
    return ContextKV(caches, context.length, context.rope, (0, 1, 2), 1, 2)


def canvas():
    tokenizer = model().tokenizer
    markers = jnp.asarray([tokenizer.vision_start, tokenizer.vision_end], jnp.int32)
    return Canvas(jnp.asarray(latent_positions((8, 8), CONFIG)), markers)


def noise():
    return jnp.asarray(np.random.RandomState(0).standard_normal((TOKENS, WIDTH)).astype(np.float32))


def run(context, g, steps=6, interval=(0.0, 1.0), stops=None):
    """Latents after each stop."""
    plan = jax.tree.map(jnp.asarray, schedule(steps, 3.0, interval))
    state, seen = DenoiseState(noise(), jnp.int32(0)), []
    for stop in stops or [steps - 1]:
        state = denoise(weights().graph, weights().params, state, jnp.int32(stop), plan, canvas(), context, g)
        assert int(state.step) == stop
        seen.append(np.array(state.latents))
    return seen


def poisoned(context, row):
    """The contexts with NaN in place of one row's cache."""
    caches = list(context.caches)
    caches[row] = KV(*(jnp.full_like(x, jnp.nan) for x in caches[row]))
    return ContextKV(tuple(caches), context.length, context.rope, context.rows, context.text_row, context.img_row)


@jax.jit
def one_branch(params, latents, timestep, cache, length, rope):
    """The velocity of one branch, alone."""
    prefix = Prefix((cache,), (0,), length[None])
    args = latents[None], timestep[None], canvas().position_ids, canvas().markers, rope[None], prefix
    return nnx.merge(weights().graph, params).velocity(*args)[0]


def plain_loop(context, g, steps, interval):
    """What the loop does, in plain Python, one branch at a time."""
    points = timesteps(steps, 3.0)
    latents, seen = np.asarray(noise()), []
    for t, following in itertools.pairwise(points):
        branches = [
            one_branch(weights().params, latents, t, context.caches[cache], context.length[i], context.rope[i])
            for i, cache in enumerate(context.rows)
        ]
        v = np.asarray(branches[0])
        if interval[0] < t <= interval[1] and g.text_scale > 1:
            v = np.asarray(combine(v, branches[context.text_row], branches[context.img_row], g))
        latents = latents - v * (t - following)
        seen.append(latents)
    return seen


@pytest.mark.parametrize("g", [OFF, TEXT, BOTH], ids=["off", "text", "both"])
def test_compiled_loop_equals_a_plain_one(context, g):
    """The compiled loop takes another timestep, step width or branch than the definition, at any step."""
    interval = (0.5, 1.0)  # on for the first steps only
    ours = run(context, g, 6, interval, stops=range(1, 6))
    for step, wanted in zip(ours, plain_loop(context, g, 6, interval), strict=True):
        np.testing.assert_allclose(step, wanted, rtol=1e-3, atol=1e-4)


def test_in_pieces_or_at_once(context):
    """A watched request, run step by step, makes another picture than an unwatched one."""
    at_once = run(context, BOTH)[-1]
    for stops in (range(1, 6), (2, 5), (5,)):
        np.testing.assert_array_equal(run(context, BOTH, stops=stops)[-1], at_once)


def test_a_stop_already_reached_does_nothing(context):
    """A request that is asked to stop where it stands takes one more step."""
    first, second = run(context, BOTH, stops=(3, 3))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("row", [1, 2])
def test_branches_that_are_off_do_not_matter(apart, row):
    """A branch gets into the picture at steps at which it is off."""
    clean, dirty = apart, poisoned(apart, row)
    cases = [(OFF, (0.0, 1.0)), (BOTH, (0.0, 0.0)), (BOTH, (1.0, 1.0))]
    if row == 2:
        cases += [(TEXT, (0.0, 1.0)), (guidance(4.0, 0.5, "channel", 0.0), (0.0, 1.0))]
    for g, interval in cases[: 2 if row == 1 else None]:
        np.testing.assert_array_equal(run(dirty, g, 4, interval)[-1], run(clean, g, 4, interval)[-1])
    # The poison does work.
    assert np.isnan(run(dirty, BOTH, 4)[-1]).all()


def test_branches_are_off_at_single_steps(apart):
    """A branch gets into the picture at all steps if it is on at one."""
    interval = (0.0, 0.7)  # of t = 1, 0.857, 0.6, 0: on at the last
    seen = run(poisoned(apart, 1), BOTH, 4, interval, stops=(1, 2, 3))
    assert [bool(np.isnan(x).any()) for x in seen] == [False, False, True]


class Counting:
    """Stands in for the model, and notes how many rows are computed."""

    def __init__(self):
        self.rows = []

    def velocity(self, latents, *_):
        jax.debug.callback(lambda: self.rows.append(latents.shape[0]))
        return latents


@pytest.mark.parametrize(
    ("text_row", "img_row", "wanted"),
    [
        (1, 2, [1, 1, 2, 3]),  # an edit
        (1, 0, [1, 1, 2, 2]),  # text2img: the context without pictures is the full one
        (0, 1, [1, 1, 1, 2]),  # a prompt that ends in a picture
        (0, 0, [1, 1, 1, 1]),
    ],
)
def test_branches_that_are_off_are_not_computed(text_row, img_row, wanted):
    """Every step costs as much as a guided one."""
    counting, rows = Counting(), max(text_row, img_row) + 1
    zeros = jnp.zeros(rows, jnp.int32)
    context = ContextKV((), zeros, zeros, (0,) * rows, text_row, img_row)
    for g, guided in ((BOTH, False), (OFF, True), (TEXT, True), (BOTH, True)):
        guided_velocity(counting, noise(), jnp.float32(1), jnp.asarray(guided), canvas(), context, g)
        jax.effects_barrier()
    assert counting.rows == wanted


def test_regression_2_16_guidance_contexts_matter(apart):
    """Only one of the three contexts arrives, and guidance is silently off."""
    plain = run(apart, BOTH)[-1]
    for row in range(3):
        caches = list(apart.caches)
        caches[row] = KV(*(x[:, ::-1] * 0.5 for x in caches[row]))
        other = ContextKV(tuple(caches), apart.length, apart.rope, apart.rows, 1, 2)
        assert np.abs(run(other, BOTH)[-1] - plain).max() > 1e-3
    assert np.abs(run(apart, OFF)[-1] - plain).max() > 1e-2
    assert np.abs(run(apart, TEXT)[-1] - plain).max() > 1e-2


@pytest.mark.parametrize("field", ["length", "rope"])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_every_row_has_its_own_place(apart, field, row):
    """A branch uses another branch's length or RoPE position."""
    values = {"length": apart.length, "rope": apart.rope}
    values[field] = values[field].at[row].add(-1)
    other = ContextKV(apart.caches, values["length"], values["rope"], apart.rows, 1, 2)
    assert np.abs(run(other, BOTH, 3)[-1] - run(apart, BOTH, 3)[-1]).max() > 1e-6


def test_regression_4_nothing_past_the_context_is_seen(context):
    """A context handed over past its real length: pure noise."""
    caches = list(context.caches)
    ends = [max(int(n) for n, row in zip(context.length, context.rows, strict=True) if row == c) for c in (0, 1)]
    dirty = tuple(KV(*(x.at[:, end:].set(1e4) for x in cache)) for cache, end in zip(caches, ends, strict=True))
    other = ContextKV(dirty, context.length, context.rope, context.rows, 1, 2)
    np.testing.assert_array_equal(run(other, BOTH)[-1], run(context, BOTH)[-1])


def test_other_settings_compile_nothing(context):
    """Another scale, shift, interval or number of steps compiles for a minute."""
    run(context, BOTH)
    before = denoise._cache_size()
    run(context, guidance(7.0, 1.2, "channel", 0.5), 9, (0.2, 0.8))
    run(context, OFF, 2)
    assert denoise._cache_size() == before


def test_decoder_puts_tokens_in_their_place():
    """A picture comes out turned, or cut into tiles in the wrong order."""
    tokens = np.zeros((8, WIDTH), np.float32)
    plain = np.asarray(decode_latents(weights().graph, weights().params, tokens, (2, 4)))
    assert plain.shape == (8, 16, 3)
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
    """The same picture comes out whatever the prompt, because the context never arrived."""
    image = picture() if modality == "img2img" else None
    first, second = (latents(modality, prompt, image, seed=3) for prompt in ("a red bench", "a blue clock"))
    assert np.abs(first - second).max() > 1e-3
    plain = [latents(modality, prompt, image, seed=3, cfg_text_scale=1.0) for prompt in ("a red bench", "a blue clock")]
    assert np.abs(plain[0] - plain[1]).max() > 1e-3


def test_regression_3_the_picture_matters():
    """An edit knows nothing of its picture."""
    first, second = (latents("img2img", "a red bench", picture(seed), seed=3) for seed in (0, 1))
    assert np.abs(first - second).max() > 1e-3


def test_inputs_that_matter():
    """Seed, negative prompt or thought have no effect on the picture."""
    plain = latents("text2img", "a red bench")
    assert np.abs(latents("text2img", "a red bench", seed=1) - plain).max() > 1e-1
    assert np.abs(latents("text2img", "a red bench", negative_prompt="a blue clock") - plain).max() > 1e-3
    thought = latents("text2img", "a red bench", think=True, max_think_tokens=5)
    assert np.abs(thought - plain).max() > 1e-3


def everything(on):
    """One request of each kind: text and latents."""
    image = picture()
    results = [
        on.generate("text2img", "a red bench", steps=4),
        on.generate("img2img", "a red bench", image, steps=4),
        on.generate("text2text", "a red bench", max_tokens=12),
        on.generate("img2text", "a red bench", image, max_tokens=12),
        on.generate("text2img", "a red bench", think=True, max_think_tokens=6, steps=4),
    ]
    return [(r.text, None if r.latents is None else r.latents.tobytes()) for r in results]


def test_regression_7_nothing_leaks_into_later_requests():
    """After an edit, plain questions are answered with ""; a request's picture depends on those before it."""
    first = everything(model())
    latents("img2img", "other", picture(5), seed=9, cfg_img_scale=3.0, cfg_renorm_type="global")
    latents("text2img", "other words here", think=True, max_think_tokens=9, steps=7)
    model().generate("text2text", "something long " * 20, max_tokens=30, do_sample=True, seed=4)
    assert everything(model()) == first
    assert first[2][0]


def test_regression_6_the_first_request_is_like_any_other():
    """State of the warm-up, or of compiling, gets into the first real request."""
    settled = everything(model())
    assert everything(new_model()) == settled


def test_regression_10_evaluations_are_counted():
    """The bar promises, and the model makes, one evaluation too many."""
    seen = []

    def progress(phase, done, total):
        if phase == "denoise":
            seen.append((done, total))

    watched = model().generate("text2img", "a", steps=4, progress=progress)
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    np.testing.assert_array_equal(watched.latents, latents("text2img", "a"))


def test_regression_11_two_steps():
    """The smallest number of steps ends in NaN."""
    assert np.isfinite(latents("img2img", "a", picture(), steps=2)).all()
    assert np.isfinite(latents("text2img", "a", steps=2, cfg_interval=(0.0, 0.0))).all()


def test_regression_30_given_noise_is_used():
    """Noise that was given is not what denoising starts from: pictures cannot be compared between programs."""
    prepared = model().prepare(Request.create("img2img", "a", picture(), seed=8))
    given = {"latent": prepared.initial_latent, "vae_0": prepared.posterior_noise[0].transpose(2, 0, 1)[None]}
    own = latents("img2img", "a", picture(), seed=8)
    np.testing.assert_array_equal(latents("img2img", "a", picture(), seed=1, init_noise=given), own)
    assert np.abs(latents("img2img", "a", picture(), seed=1) - own).max() > 1e-1


def test_latents_that_are_not_finite_are_an_error():
    """A black picture is written as if all were well."""
    huge = {"latent": np.full((TOKENS, WIDTH), 3e38, np.float32)}
    with pytest.raises(FloatingPointError, match="not finite"):
        latents("text2img", "a", init_noise=huge, cfg_text_scale=1e4)
