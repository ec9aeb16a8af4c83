"""Rows of packed samples: the numbers of one request at a time, whatever lies beside it, and their gradients."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import through
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from small import CONFIG, weights
from training import full_batch, tiny_weights

from bagel_jax.layout import PackedMask
from bagel_jax.models import attention
from bagel_jax.models.attention import KV, attend_packed
from bagel_jax.models.mot import Block
from bagel_jax.models.weights import fill, flatten
from bagel_jax.train.objective import loss
from bagel_jax.train.packing import Batch, TextPart, VaePart, lay_out, pack


def naive(q, kv, seen):
    """One query and one head at a time, in float64; NaN for a query that sees nothing."""
    out = np.full(q.shape, np.nan)
    group = q.shape[1] // kv.k.shape[1]
    for t in range(q.shape[0]):
        for head in range(q.shape[1]):
            keys, values = (np.asarray(x[seen[t], head // group], np.float64) for x in kv)
            if len(keys):
                scores = keys @ np.asarray(q[t, head], np.float64) / np.sqrt(q.shape[-1])
                soft = np.exp(scores - scores.max())
                out[t, head] = soft @ values / soft.sum()
    return out


def definition(mask: PackedMask) -> np.ndarray:
    """`PackedMask` in words: who sees whom, one pair at a time."""
    count = len(mask.segment_ids)
    seen = np.zeros((count, count), bool)
    for me in range(count):
        for other in range(count):
            seen[me, other] = (
                mask.segment_ids[me] == mask.segment_ids[other]
                and mask.position[other] < mask.kv_end[me]
                and mask.noised_id[other] in (0, mask.noised_id[me])
            )
    return seen


def drawn(seed, tokens=11, kv_heads=2, group=2, width=4):
    """Queries, keys, values, and who sees whom, all at random."""
    generator = np.random.RandomState(seed)

    def normal(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    mask = PackedMask(
        segment_ids=generator.randint(0, 3, tokens).astype(np.int32),
        position=generator.permutation(tokens).astype(np.int32),
        kv_end=generator.randint(0, tokens + 1, tokens).astype(np.int32),
        noised_id=generator.randint(0, 3, tokens).astype(np.int32) * (generator.rand(tokens) < 0.5),
    )
    kv = KV(normal(tokens, kv_heads, width), normal(tokens, kv_heads, width))
    return 2 * normal(tokens, kv_heads * group, width), kv, jax.tree.map(lambda x: x.astype(np.int32), mask)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_mask_is_its_definition(seed):
    """A token sees another sample, what comes after it, or a noised image of others."""
    mask = drawn(seed)[2]
    assert np.array_equal(mask.seen(mask), definition(mask))


@pytest.mark.parametrize("limit", [10**9, 100, 50, 1])
def test_attention_is_softmax_over_what_is_seen(limit, monkeypatch):
    """Attention reads tokens that are not seen, or the slices that long rows are cut into do not fit together."""
    monkeypatch.setattr(attention, "_MAX_SCORES", dict.fromkeys(("cpu", "default"), limit))
    for seed in range(6):
        q, kv, mask = drawn(seed)
        ours = np.asarray(attend_packed(q, kv, mask))
        wanted = naive(q, kv, definition(mask))
        blind = np.isnan(wanted).all(axis=(1, 2))
        assert blind.sum() < len(q)
        np.testing.assert_allclose(ours[~blind], wanted[~blind], rtol=1e-4, atol=1e-5)
        assert np.isfinite(ours).all()


def test_gradients_in_slices_are_the_same(monkeypatch):
    """Training on long rows has other gradients than on short ones, or NaN from padding."""

    def gradients(limit):
        monkeypatch.setattr(attention, "_MAX_SCORES", dict.fromkeys(("cpu", "default"), limit))
        q, kv, mask = drawn(3)
        return jax.grad(lambda q, k, v: jnp.sum(jnp.sin(attend_packed(q, KV(k, v), mask))), (0, 1, 2))(q, *kv)

    for whole, sliced in zip(gradients(10**9), gradients(100), strict=True):
        assert np.isfinite(whole).all()
        assert np.abs(whole).max() > 0.01
        np.testing.assert_allclose(sliced, whole, rtol=1e-4, atol=1e-6)


def test_slices_hold_few_scores(monkeypatch):
    """Packed rows of 20,000 tokens hold all their scores at once and run out of memory, backwards too."""
    monkeypatch.setattr(attention, "_MAX_SCORES", dict.fromkeys(("cpu", "default"), 2000))
    q, kv, mask = drawn(0, tokens=400)

    def total(q, k, v):
        return jnp.sum(attend_packed(q, KV(k, v), mask) ** 2)

    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, *kv).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 400 * 400 * 4 * 4 / 4


def serve(trunk, texts, block):
    """Hidden states of a text, a clean image's block and another text, as stage 0 computes them."""
    first, second = texts
    n, rope = len(block), len(first)
    out1, cache = through(trunk, Block(trunk.embed(jnp.asarray(first))), jnp.arange(rope), jnp.arange(rope) + 1)
    und = trunk.embed(jnp.asarray([700, 701]))
    end = rope + n + 2
    out2, cache = through(trunk, Block(und, block), jnp.full(n + 2, rope), jnp.full(n + 2, end), cache)
    place = jnp.arange(len(second))
    out3, _ = through(trunk, Block(trunk.embed(jnp.asarray(second))), rope + 1 + place, end + place + 1, cache)
    return jnp.concatenate([out1.und, out2.und, out3.und]), out2.gen


def test_the_trunk_learns_what_it_serves():
    """Training and serving are two models: positions, experts or masks differ."""
    model = weights().model()
    generator = np.random.RandomState(0)
    texts = (3, 1, 4, 1), (5, 9, 2)
    latents = generator.standard_normal((5, CONFIG.latent_dim)).astype(np.float32)
    positions = np.array([0, 1, 2, 8, 9])
    parts = [TextPart(texts[0]), VaePart(latents, positions), TextPart(texts[1])]
    other = [TextPart((7, 7)), VaePart(latents[:2], positions[:2])]
    samples = [lay_out(p, (700, 701), patch_dim=588, latent_dim=CONFIG.latent_dim) for p in (other, parts)]
    # Behind another sample, with places to spare.
    batch = Batch.of(pack([samples], {"text": 20, "vit": 3, "latent": 9}))

    @partial(jax.jit, static_argnames="remat")
    def packed(model_params, batch, remat):
        m = nnx.merge(weights().graph, model_params)
        text = m.trunk.embed(batch.ids)
        vit = jnp.zeros((1, 3, text.shape[-1]))
        gen = m.embed_latents(batch.latents, batch.timestep, batch.latent_positions)
        return m.trunk.packed(Block(jnp.concatenate([text, vit], axis=1), gen), batch.rope, batch.mask, remat=remat)

    gen = model.embed_latents(latents[None], jnp.zeros((1, 1)), positions)
    und, gen = serve(model.trunk, texts, gen[0])
    for remat in (False, True):
        ours = packed(weights().params, batch, remat)
        np.testing.assert_allclose(ours.und[0, 4:13], und, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(ours.gen[0, 2:7], gen, rtol=1e-4, atol=1e-4)
        assert np.isfinite(ours.und).all()
        assert np.isfinite(ours.gen).all()


def test_a_row_of_images_is_each_image_alone():
    """The ViT sees an image otherwise in training than in serving."""
    generator = np.random.RandomState(0)
    sizes = 3, 5, 1
    images = [generator.standard_normal((n, 588)).astype(np.float32) for n in sizes]
    positions = [generator.permutation(16)[:n].astype(np.int32) for n in sizes]
    places, count = 12, sum(sizes)
    sample = np.zeros((1, places), np.int32)
    sample[0, :count] = np.repeat([1, 2, 3], sizes)
    row = np.full((1, places, 588), 7, np.float32)  # rubbish in the padding
    row[0, :count] = np.concatenate(images)
    ids = np.zeros((1, places), np.int32)
    ids[0, :count] = np.concatenate(positions)
    zero = np.zeros_like(sample)
    vit = weights().model().vit
    for remat in (False, True):
        ours = vit.packed(row, ids, PackedMask(sample, zero, zero + 1, zero), remat=remat)
        assert np.isfinite(ours).all()
        start = 0
        for patches, where in zip(images, positions, strict=True):
            alone = vit(patches, where, jnp.int32(len(patches)))
            np.testing.assert_allclose(ours[0, start : start + len(patches)], alone, rtol=1e-4, atol=1e-5)
            start += len(patches)


def test_remat_changes_nothing():
    """What saves memory changes what is learned."""
    batch = jax.tree.map(lambda x: x[0], full_batch())
    arrays = flatten(tiny_weights().params)
    some = {f"{name}.kernel": arrays[f"{name}.kernel"] for name in ("trunk.layers.gen.q", "vit.layers.fc1")}

    def total(some, remat):
        return loss(fill(tiny_weights(), arrays | some).model(), batch, remat=remat)[0]

    (plain, wanted), (value, ours) = (
        jax.jit(jax.value_and_grad(total), static_argnums=1)(some, remat) for remat in (False, True)
    )
    assert float(value) == pytest.approx(float(plain), rel=1e-6)
    for name in some:
        assert np.abs(wanted[name]).max() > 1e-3
        np.testing.assert_allclose(ours[name], wanted[name], rtol=1e-4, atol=1e-6)


def test_remat_keeps_less():
    """`run.remat` saves no memory."""
    model = tiny_weights()
    batch = jax.tree.map(lambda x: x[0], full_batch())

    def total(params, remat):
        return loss(nnx.merge(model.graph, params), batch, remat=remat)[0]

    def kept(remat):
        backward = jax.eval_shape(lambda params: jax.vjp(lambda p: total(p, remat), params)[1], model.params)
        return sum(x.size for x in jax.tree.leaves(backward))

    assert kept(True) < 0.8 * kept(False)
