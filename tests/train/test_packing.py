"""Samples laid out and packed: who sees whom, where each token stands, and what a neighbour must not change."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from training import DIMS, MARKERS, TINY, tiny_weights

from bagel_jax.layout import Gap
from bagel_jax.train.objective import loss, token_losses
from bagel_jax.train.packing import Batch, TextPart, VaePart, VitPart, lay_out, pack

PLACES = {"text": 72, "vit": 40, "latent": 40}
ROWS = 2
# Kind, size (tokens of a text, or of an image).
KINDS = [("text", 4), ("answer", 5), ("answer", 2), ("vit", 3), ("clean", 2), ("noised", 3), ("noised", 1), ("drop", 1)]


@functools.partial(jax.jit, static_argnames="graph")
def compiled(graph, params, batch):
    return token_losses(nnx.merge(graph, params), batch)


def each_loss(batch: Batch):
    """`TokenLosses` as NumPy arrays."""
    weights = tiny_weights()
    return jax.tree.map(np.asarray, compiled(weights.graph, weights.params, batch))


def part(kind: str, size: int, generator: np.random.RandomState):
    """One segment with random contents."""
    if kind == "drop":
        return Gap(size)
    if kind in ("text", "answer"):
        return TextPart(tuple(generator.randint(0, 700, size).tolist()), kind == "answer")
    if kind == "vit":
        patches = generator.standard_normal((size, DIMS["patch_dim"])).astype(np.float32)
        return VitPart(patches, generator.permutation(TINY.max_vit_patches**2)[:size])
    latents, noise = generator.standard_normal((2, size, DIMS["latent_dim"])).astype(np.float32)
    positions = generator.permutation(TINY.max_latent_size**2)[:size]
    if kind == "clean":
        return VaePart(latents, positions)
    return VaePart(latents, positions, float(generator.uniform(0.05, 1)), noise)


def parts_of(kinds, seed=0):
    generator = np.random.RandomState(seed)
    return [part(kind, size, generator) for kind, size in kinds]


def sample_of(kinds, seed=0, **options):
    return lay_out(parts_of(kinds, seed), MARKERS, **DIMS, **options)


def batch_of(*rows) -> Batch:
    """Rows of samples; empty ones below them."""
    return Batch.of(pack([*map(list, rows), *([[]] * (ROWS - len(rows)))], PLACES))


def tokens(batch: Batch, row: int, number: int) -> np.ndarray:
    """Places of one sample's tokens in a row, in the sample's order."""
    places = np.flatnonzero(batch.mask.segment_ids[row] == number)
    return places[np.argsort(batch.mask.position[row, places])]


def official_mask(kinds) -> np.ndarray:
    """Who sees whom in one sample, `prepare_attention_mask_per_sample` of the official `data/data_utils.py`."""
    spans, start = [], 0
    for kind, size in kinds:
        if kind != "drop":
            length = size if kind in ("text", "answer") else size + 2
            spans.append((start, start + length, kind))
            start += length
    mask = np.zeros((start, start), bool)
    for begin, end, kind in spans:
        causal = kind in ("text", "answer")
        mask[begin:end, begin:end] = np.tril(np.ones((end - begin,) * 2)) if causal else 1
        mask[begin:end, :begin] = 1
    for begin, end, kind in spans:
        if kind == "noised":
            mask[:, begin:end] = False
            mask[begin:end, begin:end] = True
    return mask


some_kinds = st.lists(st.sampled_from(KINDS), min_size=1, max_size=4).filter(
    lambda kinds: {k for k, _ in kinds} - {"drop"}
)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), samples=st.lists(some_kinds, min_size=2, max_size=4), data=st.data())
def test_packed_samples_do_not_know_of_each_other(seed, samples, data):
    """What a model learns from a sample depends on which ones happen to lie beside it."""
    laid = [sample_of(kinds, seed + i) for i, kinds in enumerate(samples)]
    chosen = [data.draw(st.integers(0, ROWS - 1), label="row") for _ in laid]
    rows = [[s for s, row in zip(laid, chosen, strict=True) if row == r] for r in range(ROWS)]
    batch = batch_of(*rows)
    packed = each_loss(batch)
    assert all(np.isfinite(x).all() for x in packed)
    numbers = [0] * ROWS
    total = np.zeros(2)
    for row, sample in zip(chosen, laid, strict=True):
        numbers[row] += 1
        one = batch_of([sample])
        alone = each_loss(one)
        for ours, theirs, kind in zip(packed, alone, ("text", "latent"), strict=True):
            size = len(sample[kind])
            start = {"text": 0, "latent": PLACES["text"] + PLACES["vit"]}[kind]
            places = np.flatnonzero(batch.mask.segment_ids[row, start : start + PLACES[kind]] == numbers[row])
            assert len(places) == size
            np.testing.assert_allclose(ours[row, places], theirs[0, :size], rtol=1e-4, atol=1e-5)
        total += [float(x.sum()) for x in alone]
    np.testing.assert_allclose([float(x.sum()) for x in packed], total, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(samples=st.lists(some_kinds, min_size=1, max_size=3))
def test_mask_is_the_official_one(samples):
    """A text sees what comes after it, or an image that carries noise."""
    batch = batch_of([sample_of(kinds, i) for i, kinds in enumerate(samples)])
    mask = jax.tree.map(lambda x: x[0], batch.mask)
    seen = np.asarray(mask.seen(mask))
    wanted = np.zeros_like(seen)
    for number, kinds in enumerate(samples, 1):
        places = tokens(batch, 0, number)
        expected = official_mask(kinds)
        assert np.array_equal(seen[np.ix_(places, places)], expected)
        wanted[np.ix_(places, places)] = expected
    assert np.array_equal(seen, wanted)  # nothing between samples, nothing of padding


@settings(deadline=None, max_examples=40)
@given(samples=st.lists(some_kinds, min_size=1, max_size=3))
def test_vit_sees_one_image_at_a_time(samples):
    """The ViT mixes the patches of two images of one record."""
    batch = batch_of([sample_of(kinds, i) for i, kinds in enumerate(samples)])
    mask = jax.tree.map(lambda x: x[0], batch.vit_mask)
    sizes = [size for kinds in samples for kind, size in kinds if kind == "vit"]
    expected = np.zeros((PLACES["vit"], PLACES["vit"]), bool)
    start = 0
    for size in sizes:
        expected[start : start + size, start : start + size] = True
        start += size
    expected[start:, start:] = True  # padding sees padding, so that it stays finite
    assert np.array_equal(mask.seen(mask), expected)


MIXED = [("answer", 4), ("noised", 3), ("answer", 5), ("clean", 2), ("noised", 2), ("answer", 3)]


@pytest.mark.parametrize("which", [1, 4])
def test_a_noised_image_is_seen_by_nobody_but_itself(which):
    """Answers and other images learn from a noisy image that they will never have before them."""
    parts = parts_of(MIXED)
    before = each_loss(batch_of([lay_out(parts, MARKERS, **DIMS)]))
    noised = parts[which]
    parts[which] = dataclasses.replace(noised, latents=noised.latents + 1, timestep=noised.timestep / 2)
    after = each_loss(batch_of([lay_out(parts, MARKERS, **DIMS)]))
    np.testing.assert_array_equal(before.ce, after.ce)
    kinds = np.repeat([1, 3, 4], [3, 2, 2])  # number of the part that a latent token belongs to
    assert np.array_equal((before.mse != after.mse)[0, :7], kinds == which)


def test_a_clean_image_and_a_text_are_seen():
    """Conditions do nothing: what is produced does not depend on what comes before."""
    for which in (0, 3):
        parts = parts_of(MIXED)
        before = each_loss(batch_of([lay_out(parts, MARKERS, **DIMS)]))
        if which == 3:
            parts[3] = dataclasses.replace(parts[3], latents=parts[3].latents + 1)
        else:
            parts[0] = dataclasses.replace(parts[0], ids=(parts[0].ids[0] + 1, *parts[0].ids[1:]))
        after = each_loss(batch_of([lay_out(parts, MARKERS, **DIMS)]))
        changed = (before.mse != after.mse)[0]
        assert changed[5:7].all()
        assert changed[:3].all() == (which == 0)  # the first noised image stands before the clean one
        ce = (before.ce != after.ce)[0]
        answers = np.flatnonzero(before.ce[0])
        assert ce[answers[-2:]].all()  # the last text
        assert ce[answers[3:7]].all() == (which == 0)  # the one before the clean image


def test_rope_positions():
    """Positions in training are others than those that a request gets."""
    kinds = [("text", 3), ("vit", 3), ("noised", 2), ("answer", 2), ("drop", 1), ("clean", 2), ("drop", 2), ("text", 2)]
    batch = batch_of([sample_of(kinds)])
    rope = batch.rope[0, tokens(batch, 0, 1)]
    # An image has one position; a noised one does not move it on; one that is left out does.
    assert rope.tolist() == [0, 1, 2, *[3] * 5, *[4] * 4, 4, 5, *[7] * 4, 10, 11]


def test_labels():
    """The model learns to repeat the token it reads, learns questions, or learns markers that the engine adds."""
    parts = [TextPart((1, 2, 3)), VitPart(np.zeros((1, DIMS["patch_dim"]), np.float32), np.zeros(1))]
    batch = batch_of([lay_out([*parts, TextPart((4, 5, 6, 7), loss=True)], MARKERS, **DIMS)])
    assert batch.ids[0, :9].tolist() == [1, 2, 3, *MARKERS, 4, 5, 6, 7]
    assert batch.labels[0, :9].tolist() == [-1] * 5 + [5, 6, 7, -1]
    assert (batch.labels[0, 9:] == -1).all()
    assert (batch.text_weight[0] > 0).tolist() == (batch.labels[0] >= 0).tolist()


@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_ce_power(power):
    """Long answers drown short ones although `ce_power` says otherwise, or the reverse."""
    samples = [sample_of([("text", 4), ("answer", n + 1)], n, ce_power=power) for n in (1, 4, 9)]
    batch = batch_of(samples)
    for number, n in enumerate((1, 4, 9), 1):
        mine = batch.text_weight[0][batch.mask.segment_ids[0, : PLACES["text"]] == number]
        np.testing.assert_allclose(mine.sum(), n ** (1 - power), rtol=1e-6)


def test_loss_is_the_weighted_mean():
    """The two terms are not the means that the official code reports; a batch without images is NaN."""
    weights = tiny_weights()
    mean = jax.jit(lambda params, batch: loss(nnx.merge(weights.graph, params), batch, ce_weight=0.25, mse_weight=3.0))
    batch = batch_of([sample_of(MIXED, ce_power=0.5)], [sample_of([("answer", 5), ("noised", 1)], 1, ce_power=0.5)])
    each = each_loss(batch)
    total, parts = mean(weights.params, batch)
    learned, noised = batch.labels >= 0, batch.timestep > 0
    assert learned.sum() == 3 + 4 + 2 + 4
    assert noised.sum() == 3 + 2 + 1
    weight = np.where(learned, batch.text_weight, 0)
    assert float(parts["ce"]) == pytest.approx((each.ce * weight).sum() / weight.sum(), rel=1e-4)
    assert float(parts["mse"]) == pytest.approx(each.mse.sum() / noised.sum(), rel=1e-4)
    assert float(total) == pytest.approx(0.25 * float(parts["ce"]) + 3 * float(parts["mse"]), rel=1e-4)
    for kinds in ([("text", 3)], [("answer", 3)], [("noised", 2)]):
        total, parts = mean(weights.params, batch_of([sample_of(kinds)]))
        assert float(parts["ce"] > 0) == (kinds[0][0] == "answer")
        assert float(parts["mse"] > 0) == (kinds[0][0] == "noised")
        assert np.isfinite(total)


def test_logits_in_slices_give_the_same(monkeypatch):
    """With a large vocabulary, logits are made a slice at a time, and tokens at the seams are lost."""
    weights, batch = tiny_weights(), batch_of([sample_of(MIXED)], [sample_of(MIXED, 1)])
    monkeypatch.setattr("bagel_jax.train.objective._MAX_LOGITS", 7 * TINY.trunk.vocab_size)  # 144 tokens, 7 at a time
    sliced = jax.jit(lambda params: token_losses(nnx.merge(weights.graph, params), batch))(weights.params)
    np.testing.assert_allclose(sliced.ce, each_loss(batch).ce, rtol=1e-5, atol=1e-6)
