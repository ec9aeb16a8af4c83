"""The trunk: which expert reads what, and where tokens lie."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import through
from flax import nnx
from small import CONFIG, drawn, weights

from bagel_jax.models.attention import KV
from bagel_jax.models.mot import Block, MoT, rotary
from bagel_jax.pallas.paged_attention.api import paged_attention
from bagel_jax.pallas.paged_attention.pages import empty_pages, to_dense, write

ONE_LAYER = dataclasses.replace(CONFIG.trunk, num_layers=1, vocab_size=16)


@pytest.fixture(scope="module")
def one_layer():
    """A trunk of one layer, split."""
    graph, params = nnx.split(nnx.eval_shape(lambda: MoT(ONE_LAYER, jnp.float32, nnx.Rngs(0))))
    return graph, drawn(params)


def latent_block(seed=0, latents=3):
    generator = np.random.RandomState(seed)
    return Block(*(jnp.asarray(generator.standard_normal((n, 32)).astype(np.float32)) for n in (2, latents)))


@partial(jax.jit, static_argnames="graph")
def run(graph, params, block):
    """All layers over a latent block that stands at position 3, behind nothing."""
    size = len(block.gen) + 2
    return through(nnx.merge(graph, params), block, jnp.full((size,), 3), jnp.full((size,), size))


def changed(one_layer, path):
    """What one layer makes of a block before and after a parameter is changed."""
    graph, params = one_layer
    flat = dict(nnx.to_flat_state(params))
    place = tuple(path.split("."))
    noise = np.random.RandomState(0).standard_normal(flat[place].shape).astype(np.float32)
    flat[place] = flat[place].replace(flat[place].get_value() + noise)
    return run(graph, params, latent_block()), run(graph, nnx.from_flat_state(flat.items()), latent_block())


def differ(a, b):
    """For each token of `[T, D]` or `[L, T, K, E]`, whether the two differ."""
    a, b = (np.asarray(x)[None] if x.ndim == 2 else np.asarray(x) for x in (a, b))
    return [bool(np.abs(a[:, t] - b[:, t]).max() > 1e-6) for t in range(a.shape[1])]


MARKERS, LATENTS = [True, True, False, False, False], [False, False, True, True, True]


@pytest.mark.parametrize("name", ["k.kernel", "k.bias", "k_norm.scale"])
def test_keys_come_from_the_tokens_expert(one_layer, name):
    """Markers of a latent block go through the generation expert, or latents through the understanding one."""
    for expert, who in (("und", MARKERS), ("gen", LATENTS)):
        (_, before), (_, after) = changed(one_layer, f"layers.{expert}.{name}")
        assert differ(before.k, after.k) == who
        assert differ(before.v, after.v) == [False] * 5


@pytest.mark.parametrize("name", ["v.kernel", "v.bias"])
def test_values_come_from_the_tokens_expert(one_layer, name):
    """Values of one kind of token come from the other's expert."""
    for expert, who in (("und", MARKERS), ("gen", LATENTS)):
        (_, before), (_, after) = changed(one_layer, f"layers.{expert}.{name}")
        assert differ(before.v, after.v) == who
        assert differ(before.k, after.k) == [False] * 5


@pytest.mark.parametrize(
    "name",
    ["q.kernel", "q.bias", "q_norm.scale", "o.kernel", "post_norm.scale", "gate.kernel", "up.kernel", "down.kernel"],
)
def test_outputs_come_from_the_tokens_expert(one_layer, name):
    """Queries, output projection or MLP of one kind of token come from the other's expert."""
    for expert in ("und", "gen"):
        (before, kv), (after, same) = changed(one_layer, f"layers.{expert}.{name}")
        assert differ(before.und, after.und) == [expert == "und"] * 2
        assert differ(before.gen, after.gen) == [expert == "gen"] * 3
        assert differ(kv.k, same.k) == differ(kv.v, same.v) == [False] * 5


def test_final_norm_is_the_tokens_own(one_layer):
    """The final norm of the wrong expert scales every velocity."""
    (before, _), (after, _) = changed(one_layer, "norm.scale")
    assert differ(before.und, after.und) == [True] * 2
    assert differ(before.gen, after.gen) == [False] * 3
    (before, _), (after, _) = changed(one_layer, "norm_gen.scale")
    assert differ(before.und, after.und) == [False] * 2
    assert differ(before.gen, after.gen) == [True] * 3


def test_text_does_not_know_the_generation_expert():
    """Answers to questions depend on the weights that make images."""
    params = weights().params
    flat = dict(nnx.to_flat_state(params))
    gen = [path for path in flat if {"gen", "norm_gen"} & set(path)]
    assert len(gen) == 15
    nan = {path: flat[path].replace(jnp.asarray(np.full(flat[path].shape, np.nan, np.float32))) for path in gen}
    poisoned = nnx.from_flat_state((flat | nan).items())

    @jax.jit
    def text(params):
        trunk = nnx.merge(weights().graph, params).trunk
        out, kv = through(trunk, Block(trunk.embed(jnp.arange(6))), jnp.arange(6), jnp.arange(6) + 1)
        return trunk.logits(out.und), kv

    for ours, theirs in zip(jax.tree.leaves(text(params)), jax.tree.leaves(text(poisoned)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_rows_do_not_see_each_other():
    """A guidance branch, or a neighbour's request, changes what another row computes."""
    trunk = weights().model().trunk
    generator = np.random.RandomState(5)
    lengths, ropes, block = (4, 7, 0), (4, 9, 0), latent_block()
    both = Block(*(jnp.stack([x, x + 1, x]) for x in block))
    caches = [KV(*generator.standard_normal((2, 2, length, 2, 8)).astype(np.float32)) for length in lengths]
    pages = empty_pages(2, 4, 2, 16, 8, jnp.float32)  # one a row, of its context and its block
    for row, cache in enumerate(caches):
        for layer in range(2):
            place = jnp.arange(lengths[row])
            pages = write(pages, layer, jnp.full_like(place, row + 1), place, cache.k[layer], cache.v[layer])
    page, slot = jnp.repeat(jnp.arange(3) + 1, 5), (jnp.asarray(lengths)[:, None] + jnp.arange(5)).reshape(-1)
    table, offsets, end = jnp.asarray([[1], [2], [3]]), jnp.arange(4) * 5, jnp.repeat(jnp.asarray(lengths) + 5, 5)

    def attention(layer, q, k, v, pages):
        k, v = (x.joined(1).reshape(15, 2, 8) for x in (k, v))
        pages = write(pages, layer, page, slot, k, v)
        out = paged_attention(q.joined(1).reshape(15, 4, 8), pages, layer, table, offsets, end, backend="xla")
        return q.split(out.reshape(3, 5, 4, 8), 1), pages

    positions = jnp.repeat(jnp.asarray(ropes)[:, None], 5, axis=1)
    out, pages = jax.jit(lambda *args: trunk(*args[:2], attention, args[2]))(both, positions, pages)
    out = trunk.normed(out)
    for row, (past, length) in enumerate(zip(caches, lengths, strict=True)):
        mine = Block(*(x[row] for x in both))
        alone, kv = through(trunk, mine, positions[row], jnp.full(5, length + 5), past)
        np.testing.assert_allclose(out.gen[row], alone.gen, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(out.und[row], alone.und, rtol=1e-4, atol=1e-5)
        own, _ = to_dense(pages, np.asarray([row + 1]))
        np.testing.assert_allclose(own[:, length : length + 5], kv.k[:, length:], rtol=1e-4, atol=1e-5)


def test_grouped_heads_equal_repeated_ones(one_layer):
    """Query heads read the keys of another group: H = 4 heads on K = 2 must equal the same with keys repeated."""
    graph, params = one_layer
    flat = dict(nnx.to_flat_state(params))
    for expert in ("und", "gen"):
        for name in ("k", "v"):
            for kind in ("kernel", "bias"):
                variable = flat["layers", expert, name, kind]
                value = variable.get_value()
                flat["layers", expert, name, kind] = variable.replace(jnp.repeat(value, 2, axis=-2))
    full = dataclasses.replace(ONE_LAYER, num_kv_heads=4)
    other = nnx.split(nnx.eval_shape(lambda: MoT(full, jnp.float32, nnx.Rngs(0))))[0]
    where = jnp.zeros(5, jnp.int32), jnp.full((5,), 5)
    ours, _ = through(nnx.merge(graph, params), latent_block(), *where)
    theirs, kv = through(nnx.merge(other, nnx.from_flat_state(flat.items())), latent_block(), *where)
    assert kv.k.shape == (1, 5, 4, 8)
    np.testing.assert_allclose(ours.gen, theirs.gen, rtol=1e-4, atol=1e-5)


def test_rotary():
    """Positions are told by other angles than in training; far positions lose their digits."""
    cos, sin = rotary(jnp.asarray([[0, 1, 5000]]), 8, 1e6)
    frequencies = 1e6 ** (-np.arange(4) / 4)
    for i, position in enumerate((0, 1, 5000)):
        angles = np.tile(position * frequencies, 2)
        np.testing.assert_allclose(cos[0, i], np.cos(angles), atol=1e-3)
        np.testing.assert_allclose(sin[0, i], np.sin(angles), atol=1e-3)
    half, _ = rotary(jnp.asarray([4096], jnp.int32), 8, 1e6)
    assert half.dtype == jnp.float32


def test_only_distances_matter(one_layer):
    """A conversation changes meaning as it moves along: attention depends on more than distances."""
    trunk = nnx.merge(*one_layer)
    x = Block(latent_block().gen)
    outs = [through(trunk, x, jnp.arange(3) + start, jnp.arange(3) + 1)[0].und for start in (0, 50)]
    np.testing.assert_allclose(*outs, rtol=1e-4, atol=1e-4)
    other = through(trunk, x, 2 * jnp.arange(3), jnp.arange(3) + 1)[0].und
    assert np.abs(other - outs[0]).max() > 1e-3
