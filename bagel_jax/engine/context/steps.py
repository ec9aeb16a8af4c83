"""The jitted programs of stage 0 over KV in pages.

`advance` is one step: a token of each decoding row, and behind them tokens to prefill, of any sequences, which may hold
one block of an image. All keys and values of the step are written before any are attended to, so a text and the
image before it may share a step. A program is compiled for the padded sizes (`batch.py`) of its arguments; what is in
them is traced.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bagel_jax.layout import Position, text_kv_end
from bagel_jax.models.bagel import BagelModel
from bagel_jax.models.mot import Block
from bagel_jax.models.weights import Skeleton
from bagel_jax.pallas.paged_attention import pages as layout
from bagel_jax.pallas.paged_attention.api import paged_attention, paged_decode
from bagel_jax.sampling.tokens import SamplingParams, choose

# Decoding steps of one call at most, where nothing else is to be done.
MAX_CALL = 16


class DecodeBatch(NamedTuple):
    """R sequences that decode; a row of padding, or one that has ended, has `done` set."""

    token: jax.Array  # [R] int32, the token that is fed next
    place: jax.Array  # [R] int32, its place in the sequence
    rope: jax.Array  # [R] int32, its RoPE position
    count: jax.Array  # [R] int32, tokens that were fed before it
    limit: jax.Array  # [R] int32, tokens that may be fed in all
    done: jax.Array  # [R] bool

    def after(self, token: jax.Array, end_token: jax.Array) -> DecodeBatch:
        """The batch when its tokens were fed and those of `token` `[R]` chosen."""
        place, rope = Position(self.place, self.rope).after_text(1)
        done = self.done | (token == end_token) | (self.count + 1 >= self.limit)
        return DecodeBatch(token, place, rope, self.count + 1, self.limit, done)


class PrefillBatch(NamedTuple):
    """Tokens to prefill: T of text and markers, then the N of an image's block, if any."""

    ids: jax.Array  # [T] int32
    image: jax.Array | None  # [N, D], embedded patches or latents
    rope: jax.Array  # [T + N] int32
    page: jax.Array  # [T + N] int32, where each token's keys and values go; 0: padding
    slot: jax.Array  # [T + N] int32
    kv_end: jax.Array  # [T + N] int32
    offsets: jax.Array  # [S + 1] int32, see `paged_attention`
    page_table: jax.Array  # [S, n] int32


class ContextProgram(NamedTuple):
    """What is static in a step."""

    skeleton: Skeleton
    backend: str  # of attention
    latents: bool = False  # the image's tokens are latents, for the generation expert


program = partial(jax.jit, static_argnames=("static",), donate_argnames=("pages",))


def advance(
    model: BagelModel, pages, rows: DecodeBatch | None, page_table, chunk: PrefillBatch | None, static: ContextProgram
):
    """One step of the trunk; at least one of `rows`, with their `page_table` `[R, n]`, and `chunk` is there.

    Returns:
        Logits `[R, V]` of the rows (None without rows), and the pages.
    """
    ids, rope, page, slot = [], [], [], []
    num_rows = 0
    if rows is not None:
        num_rows = rows.token.shape[0]
        size = layout.page_size(pages)
        own = jnp.take_along_axis(page_table, rows.place[:, None] // size, axis=1, mode="clip")[:, 0]
        ids, rope = [rows.token], [rows.rope]
        page, slot = [jnp.where(rows.done, 0, own)], [rows.place % size]
    if chunk is not None:
        ids, rope, page, slot = [*ids, chunk.ids], [*rope, chunk.rope], [*page, chunk.page], [*slot, chunk.slot]
    ids, rope, page, slot = (jnp.concatenate(parts) for parts in (ids, rope, page, slot))
    x = Block(model.trunk.embed(ids))
    if chunk is not None and chunk.image is not None:
        x = Block(x.und, chunk.image) if static.latents else Block(jnp.concatenate([x.und, chunk.image]))

    def attention(layer, q, kv, pages):
        pages = layout.write(pages, layer, page, slot, kv.k, kv.v)
        outs = []
        if rows is not None:
            kv_end = jnp.where(rows.done, 0, text_kv_end(rows.place))
            outs.append(paged_decode(q[:num_rows], pages, layer, page_table, kv_end, backend=static.backend))
        if chunk is not None:
            ragged = chunk.page_table, chunk.offsets, chunk.kv_end
            outs.append(paged_attention(q[num_rows:], pages, layer, *ragged, backend=static.backend))
        return jnp.concatenate(outs), pages

    out, pages = model.trunk(x, rope, attention, pages)
    return (None if rows is None else model.trunk.logits(model.trunk.norm(out.und[:num_rows]))), pages


@program
def prefill(static: ContextProgram, arrays, pages, chunk: PrefillBatch):
    """Writes the keys and values of a chunk; returns something small that is there when they are, and the pages."""
    return chunk.offsets, advance(static.skeleton.merge(arrays), pages, None, None, chunk, static)[1]


@program
def mixed(static: ContextProgram, arrays, pages, rows: DecodeBatch, page_table, chunk: PrefillBatch, sampling):
    """One token for each row, and a chunk; returns the tokens chosen next, `[R, 1]`, and the pages."""
    logits, pages = advance(static.skeleton.merge(arrays), pages, rows, page_table, chunk, static)
    return choose(logits, rows.count, sampling)[:, None], pages


@program
def decode(
    static: ContextProgram, arrays, pages, rows: DecodeBatch, page_table, sampling: SamplingParams, end_token, steps
):
    """Feeds `steps` tokens to each row, fewer where it meets the end token or its limit.

    Source: official `generate_text`; so `<|im_start|>`, with which decoding begins, counts as one of the tokens.

    Args:
        static, arrays, pages: model and KV.
        rows: see `DecodeBatch`.
        page_table: `[R, n]` int32, with pages for `steps` tokens more.
        sampling: see `SamplingParams`.
        end_token: scalar.
        steps: scalar, at most `MAX_CALL`.

    Returns:
        The tokens chosen, `[R, MAX_CALL]`, of which each row's are valid up to where it ended; the rows as they stand
        then, with which the next call can go on; and the pages.
    """
    model = static.skeleton.merge(arrays)

    def step(carry):
        i, rows, chosen, pages = carry
        logits, pages = advance(model, pages, rows, page_table, None, static)
        token = choose(logits, rows.count, sampling)
        return i + 1, rows.after(token, end_token), chosen.at[:, i].set(token), pages

    chosen = jnp.zeros((rows.token.shape[0], MAX_CALL), jnp.int32)
    carry = jnp.int32(0), rows, chosen, pages
    _, rows, chosen, pages = jax.lax.while_loop(lambda c: (c[0] < steps) & ~c[1].done.all(), step, carry)
    return chosen, rows, pages


@partial(jax.jit, static_argnames=("skeleton",))
def embed_vit(skeleton, arrays, patches, position_ids, length) -> jax.Array:
    """An image's patches `[N, patch patch 3]` -> trunk inputs `[N, D]`; `length` of the N are real.

    Compiled for each padded N, of which the published model has 34 up to its 4,900 patches.
    """
    return skeleton.merge(arrays).embed_vit(patches, position_ids, length)


@partial(jax.jit, static_argnames=("skeleton", "room"))
def encode_image(skeleton, arrays, pixels, noise, size, room: int) -> jax.Array:
    """An image's pixels, padded, to clean latent tokens, those of its padding among them.

    Compiled for each padded grid (`buckets.grids`).

    Args:
        skeleton, arrays: the model.
        pixels: `[H, W, 3]` in [-1, 1], of a whole padded grid.
        noise: `[h, w, C]`, for the posterior sample.
        size: `[2]` int32, height and width of the image in pixels.
        room: tokens of the largest grid: so `embed_vae` need not be compiled for each grid.

    Returns:
        `[room, C p²]`: the tokens of the padded grid, row by row, and zeros.
    """
    model = skeleton.merge(arrays)
    tokens = model.patchify_latents(model.autoencoder.encode(pixels[None], noise[None], size)[0])
    return jnp.pad(tokens, ((0, room - tokens.shape[0]), (0, 0)))


@partial(jax.jit, static_argnames=("skeleton",))
def embed_vae(skeleton, arrays, tokens, index, position_ids) -> jax.Array:
    """Clean latent tokens as trunk inputs.

    Compiled for each padded N, of which the published model has 32 up to its 4,096 tokens.

    Args:
        skeleton, arrays: the model.
        tokens: what `encode_image` returns.
        index: `[N]` int32, which of them there are; -1: none, padding.
        position_ids: `[N]`.

    Returns:
        `[N, D]`, zeros for padding.
    """
    x = skeleton.merge(arrays).embed_latents(tokens[index][None], jnp.zeros((1, 1)), position_ids)[0]
    return jnp.where(index[:, None] < 0, jnp.zeros((), x.dtype), x)
