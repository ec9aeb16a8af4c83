"""Stage 0: caches from plans, and text from caches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, model, picture, stage, weights

from bagel_jax.ar import stage as stage_module
from bagel_jax.ar import steps
from bagel_jax.ar.stage import fitted
from bagel_jax.ar.steps import DecodeState, Sampling, bucket, empty_cache, next_logits, prefill_text
from bagel_jax.inputs.plan import Placed, Text, VaeImage, VitImage, place
from bagel_jax.models.attention import KV
from bagel_jax.request import Request

IDS = (701, 64, 381, 541, 411, 256, 336, 647, 702)
NO_END = 10**6


@pytest.fixture(scope="module")
def edit():
    """A prepared edit."""
    return model().prepare(Request.create("img2img", "a red bench", picture()))


def new_cache(capacity=64) -> KV:
    return empty_cache(CONFIG, capacity, jnp.float32)


def int32(value):
    return jnp.asarray(value, jnp.int32)


def text_cache(ids, start=0, rope=0, cache=None) -> KV:
    """A text appended to a cache, without padding by the stage."""
    ids = jnp.asarray(ids, jnp.int32)
    return prefill_text(weights().graph, weights().params, cache or new_cache(), ids, int32(start), int32(rope))


def close(a, b, length=None, start=0):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x[:, start:length], y[:, start:length], rtol=1e-4, atol=1e-5)


def sampling(end=NO_END, *, do_sample=False, temperature=1.0, seed=0) -> Sampling:
    return stage().sampling(seed, do_sample, temperature)._replace(end_token=int32(end))


def decoded(limit, choice=None, **kwargs):
    start = text_cache(IDS)
    return stage().decode(start, len(IDS), len(IDS), limit, choice or sampling(), **kwargs)


@pytest.mark.parametrize("kind", [VitImage, VaeImage])
def test_regression_22_blocks_are_wrapped_in_markers(edit, kind):
    """The markers around a picture are missing, swapped, or computed by the wrong expert."""
    block = next(p.segment for p in edit.plan.builds[0].compute if isinstance(p.segment, kind))
    cache = stage().extend(new_cache(), Placed(block, 3, 5), edit)
    tokenizer = model().tokenizer
    for marker, at in ((tokenizer.vision_start, 3), (tokenizer.vision_end, 3 + block.num_tokens - 1)):
        alone = text_cache([marker], rope=5)
        # Keys and values of the first layer come from the token's own embedding alone.
        for ours, theirs in zip(cache, alone, strict=True):
            np.testing.assert_allclose(ours[0, at], theirs[0, 0], rtol=1e-5, atol=1e-6)
    assert not np.allclose(cache.k[0, 3], cache.k[0, 3 + block.num_tokens - 1], atol=1e-3)


def test_regression_21_a_vit_block_has_one_position(edit):
    """Patches of a picture lie at increasing RoPE positions."""
    alike = np.broadcast_to(edit.pictures[0].vit_patches[:1], (16, 588))
    args = new_cache(), alike, np.zeros(16, np.int32), int32(16), jnp.asarray([703, 704])
    cache = steps.prefill_vit(weights().graph, weights().params, *args, int32(0), int32(7))
    for x in cache:  # alike in content and position: alike in every layer, whatever their place in the block
        np.testing.assert_allclose(x[:, 1:17], np.broadcast_to(x[:, 1:2], x[:, 1:17].shape), rtol=1e-4, atol=1e-5)
    other = steps.prefill_vit(weights().graph, weights().params, new_cache(), *args[1:], int32(0), int32(8))
    assert np.abs(cache.k[:, :18] - other.k[:, :18]).max() > 1e-2


def test_regression_21_a_latent_block_has_one_position(edit):
    """Latent tokens of an input picture lie at increasing RoPE positions."""
    cache = stage().extend(new_cache(), Placed(VaeImage(0, 8, 8), 0, 7), edit)
    moved = stage().extend(new_cache(), Placed(VaeImage(0, 8, 8), 0, 8), edit)
    # One position more turns all keys of the first layer by one step, and leaves the values.
    np.testing.assert_allclose(cache.v[0], moved.v[0], rtol=1e-5, atol=1e-6)
    half = CONFIG.trunk.head_dim // 2
    angle = 1.0 / CONFIG.trunk.rope_theta ** (np.arange(half) / half)
    first, second = np.asarray(cache.k[0, :66, :, :half]), np.asarray(cache.k[0, :66, :, half:])
    np.testing.assert_allclose(moved.k[0, :66, :, :half], first * np.cos(angle) - second * np.sin(angle), atol=1e-4)


def test_text_is_causal_and_pictures_are_not(edit):
    """Text sees its own future, or the patches of a picture see only those before them."""
    changed = text_cache((*IDS[:-1], 5))
    whole = text_cache(IDS)
    close(changed, whole, len(IDS) - 1)
    assert np.abs(changed.k[1, len(IDS) - 1] - whole.k[1, len(IDS) - 1]).max() > 1e-3
    patches = edit.pictures[0].vit_patches
    caches = []
    for last in (patches[-1:], -patches[-1:]):
        # A new array each time: a program may still be reading the one that it was given.
        args = (
            np.concatenate([patches[:-1], last]),
            np.arange(16, dtype=np.int32),
            int32(16),
            jnp.asarray([703, 704]),
            int32(0),
            int32(0),
        )
        caches.append(steps.prefill_vit(weights().graph, weights().params, new_cache(), *args))
    assert np.abs(caches[0].k[1, 0] - caches[1].k[1, 0]).max() > 1e-4


def test_regression_29_padded_prompt_tokens_are_not_attended():
    """An answer depends on how far its prompt was padded, and with what."""
    n = len(IDS)
    exact = text_cache(IDS)
    for padding in ([0] * 7, [9] * 7, [5, 6, 7, 701, 702, 703, 704] * 3):
        padded = text_cache((*IDS, *padding))
        close(padded, exact, n)
        logits = [next_logits(weights().model(), cache, int32(701), int32(n), int32(n))[0] for cache in (exact, padded)]
        np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


def test_regression_29_padded_patches_are_not_attended(edit):
    """A picture is understood otherwise when it is padded further."""
    patches, n = edit.pictures[0].vit_patches, 16
    caches = []
    for padded, rubbish in ((16, 0.0), (32, 0.0), (32, 1e3)):
        wide = np.pad(patches, ((0, padded - n), (0, 0)), constant_values=rubbish)
        positions = np.pad(np.arange(n, dtype=np.int32), (0, padded - n), constant_values=3)
        args = wide, positions, int32(n), jnp.asarray([703, 704]), int32(2), int32(1)
        caches.append(steps.prefill_vit(weights().graph, weights().params, new_cache(), *args))
    close(caches[0], caches[1], 2 + n + 2)
    close(caches[1], caches[2], 2 + n + 2)


def test_regression_29_nothing_behind_the_context_is_seen(edit):
    """Rubbish behind the end of a cache (padding, a discarded thought) changes what comes next."""
    n = len(IDS)
    clean = text_cache(IDS)
    dirty = KV(*(x.at[:, n:].set(1e4) for x in clean))
    for segment in (Text(IDS), VitImage(0, 4, 4), VaeImage(0, 8, 8)):
        placed = Placed(segment, n, n)
        caches = [stage().extend(jax.tree.map(jnp.copy, cache), placed, edit) for cache in (clean, dirty)]
        close(*caches, placed.kv_end)
    choice = sampling()
    assert stage().decode(clean, n, n, 5, choice)[0] == stage().decode(dirty, n, n, 5, choice)[0]


def test_a_text_is_the_same_in_one_piece_or_two():
    """A shared prefix gives another context than the same tokens computed at once."""
    whole = text_cache(IDS)
    halves = text_cache(IDS[4:], 4, 4, text_cache(IDS[:4]))
    close(whole, halves, len(IDS))


def test_shared_prefix_equals_a_cache_of_its_own():
    """A guidance context that shares a prefix sees something else, or spoils the cache it was copied from."""
    made = model().prepare(Request.create("img2img", inputs=["a red", picture(), "a blue clock"]))
    assert made.plan.builds[1].copy_from == 0
    caches = stage().prefill(made)
    alone = new_cache()
    for placed in place(tuple(p.segment for p in made.plan.builds[0].compute if isinstance(p.segment, Text))):
        alone = stage().extend(alone, placed, made)
    close(caches[made.plan.img.cache], alone, made.plan.img.length)
    first = new_cache()
    for placed in made.plan.builds[0].compute:
        first = stage().extend(first, placed, made)
    close(caches[0], first, made.plan.main.length)


def test_regression_9_length_advances_once_a_token():
    """Decoding moves on by as many positions a token as there are layers."""
    ids, cache = decoded(5)
    assert len(ids) == 5
    assert CONFIG.trunk.num_layers == 2
    written = np.abs(np.asarray(cache.k)).sum((2, 3)) > 0
    assert written[:, : len(IDS) + 5].all()
    assert not written[:, len(IDS) + 5 :].any()
    close(cache, text_cache((*IDS, *ids)), len(IDS) + 5)


def test_regression_9_state_of_decoding():
    """Length, RoPE position and count of decoding drift apart."""
    state = DecodeState(jnp.zeros(64, jnp.int32), int32(0), int32(701), int32(9), int32(4), jnp.asarray(False))
    state, _ = steps.decode(weights().graph, weights().params, text_cache(IDS), state, sampling(), int32(6))
    assert (int(state.count), int(state.length), int(state.rope)) == (6, 15, 10)


def test_decoding_is_greedy():
    """Without sampling, another token than the most likely one is chosen."""
    ids, _ = decoded(4)
    cache = text_cache(IDS)
    cache = KV(*(jnp.pad(x, ((0, 0), (0, 8), (0, 0), (0, 0))) for x in cache))
    for i, token in enumerate(ids):
        logits, cache = next_logits(weights().model(), cache, int32(token), int32(9 + i), int32(9 + i))
        if i < 3:
            assert int(jnp.argmax(logits)) == ids[i + 1]


def test_decoding_begins_with_its_marker_and_stops_before_the_end():
    """An answer runs on past its end, holds the end token, or comes one token short."""
    ids, _ = decoded(12)
    assert ids[0] == model().tokenizer.im_start
    at = next(i for i in range(2, 12) if ids[i] not in ids[:i])
    stopped, _ = decoded(12, sampling(ids[at]))
    assert stopped == ids[:at]


def test_limits_hold_for_any_number_of_tokens(monkeypatch):
    """An answer depends on how many tokens are decoded in one call, or passes its limit."""
    whole = decoded(19)[0]
    assert len(whole) == 19
    for chunk in (1, 19, 64):
        monkeypatch.setattr(stage_module, "_TOKENS_A_CALL", chunk)
        assert decoded(19)[0] == whole
        assert decoded(7)[0] == whole[:7]


def test_progress_of_decoding():
    """A bar jumps back, passes its end or never arrives."""
    seen = []
    decoded(19, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 19), (8, 19), (16, 19), (19, 19)]


def test_sampling_depends_on_the_seed_alone(monkeypatch):
    """A sampled answer cannot be repeated, or all seeds give the same one."""
    hot = [decoded(12, sampling(do_sample=True, temperature=5.0, seed=seed))[0] for seed in (1, 2, 1)]
    assert hot[0] == hot[2] != hot[1]
    monkeypatch.setattr(stage_module, "_TOKENS_A_CALL", 5)
    assert decoded(12, sampling(do_sample=True, temperature=5.0, seed=1))[0] == hot[0]
    greedy = decoded(12)[0]
    assert decoded(12, sampling(seed=9, temperature=5.0))[0] == greedy != hot[0]
    assert decoded(12, sampling(do_sample=True, temperature=1e-4, seed=9))[0] == greedy


def test_temperature():
    """The temperature has no effect or the opposite one: odds of 3 : 1 must become 9 : 1 at temperature 0.5."""
    logits = jnp.log(jnp.asarray([1.0, 3.0]))
    for temperature, chance in ((1.0, 0.75), (0.5, 0.9), (2.0, 0.634)):
        choice = sampling(do_sample=True, temperature=temperature)
        draws = jax.vmap(lambda i, choice=choice: choice.choose(logits, i))(jnp.arange(2000))
        assert float(draws.mean()) == pytest.approx(chance, abs=0.04)


def test_buckets():
    """Padding is dropped or costs as much as the work itself; every length compiles a program of its own."""
    lengths = range(1, 10000)
    for least in (16, 64):
        padded = [bucket(n, least) for n in lengths]
        assert all(p >= n for n, p in zip(lengths, padded, strict=True))
        assert all(p <= max(n + least - 1, n * 9 / 8) for n, p in zip(lengths, padded, strict=True))
        assert padded == sorted(padded)
        assert len(set(padded)) < 80
        assert all(bucket(p, least) == p for p in set(padded))


def test_a_cache_is_cut_to_its_context():
    """A context is handed over shorter than it is, or with all the room that decoding needed."""
    values = jnp.arange(512.0).reshape(1, 512, 1, 1)
    for length in (0, 1, 64, 65, 300, 512):
        cut = fitted(KV(values, -values), length)
        assert length <= cut.k.shape[1] <= max(64, length * 9 / 8 + 64)
        np.testing.assert_array_equal(cut.k[0, :length, 0, 0], np.arange(length))
        np.testing.assert_array_equal(cut.v[0, :length, 0, 0], -np.arange(length))
    assert fitted(KV(values, values), 700).k.shape[1] >= 700
