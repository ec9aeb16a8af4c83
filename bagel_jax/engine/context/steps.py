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

from bagel_jax.engine.convolutions import convolution_program
from bagel_jax.layout import Position, text_kv_end
from bagel_jax.models.attention import KV, attend
from bagel_jax.models.bagel import BagelModel
from bagel_jax.models.mot import Block
from bagel_jax.models.weights import Skeleton
from bagel_jax.pallas.paged_attention import pages as layout
from bagel_jax.pallas.paged_attention.api import paged_attention, paged_decode
from bagel_jax.placement.spread import (
    AXES,
    DATA,
    HEADS,
    IMAGE_ROWS,
    ONE_DEVICE,
    PAGES,
    QUERIES,
    SEQUENCE,
    Spec,
    Spread,
)
from bagel_jax.sampling.tokens import SamplingParams, choose

# Decoding steps of one call at most, where nothing else is to be done.
MAX_CALL = 16
# A step's tokens are cut by these axes of the mesh, where each part has enough of them to be worth it.
TOKENS = (DATA, SEQUENCE)
_LEAST_CUT = 128


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
    spread: Spread = ONE_DEVICE


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

    if rope.shape[0] >= _LEAST_CUT * static.spread.parts(TOKENS):
        # First whole: XLA of jaxlib 0.12 cuts the parts of a concatenation too, and may abort the process where they
        # are not cut evenly, "Could not slice dimension".
        x = static.spread.lay(static.spread.lay(x), TOKENS)
    decoding = None if rows is None else Decoding(page_table, jnp.where(rows.done, 0, text_kv_end(rows.place)))
    prefilling = None if chunk is None else Prefilling(chunk.kv_end, chunk.offsets, chunk.page_table)
    paged = _attention(static, num_rows, rope.shape[0] - num_rows)

    def attention(layer, q, k, v, pages):
        k, v = static.spread.lay((k, v), None, HEADS)
        kv = KV(k.joined(0), v.joined(0))
        fed, block = q.und[:num_rows], Block(q.und[num_rows:], q.gen)
        some = fed if rows is not None else None, block.joined(0) if chunk is not None else None
        (fed, out), pages = paged(layer, some, kv, pages, page, slot, decoding, prefilling)
        if chunk is None:
            return Block(fed), pages
        out = block.split(out, 0)
        return out if rows is None else out._replace(und=jnp.concatenate([fed, out.und])), pages

    out, pages = model.trunk(x, rope, attention, pages)
    return (None if rows is None else model.trunk.logits(model.trunk.norm(out.und[:num_rows]))), pages


class Decoding(NamedTuple):
    """What the attention of R rows that decode must know."""

    page_table: jax.Array  # [R, n] int32
    kv_end: jax.Array  # [R] int32


class Prefilling(NamedTuple):
    """What the attention of T + N tokens that are prefilled must know; see `PrefillBatch`."""

    kv_end: jax.Array
    offsets: jax.Array
    page_table: jax.Array


def _attend(static: ContextProgram, cut: bool, layer, q, kv: KV, pages, page, slot, decoding, prefilling):
    """Writes the step's keys and values, and attends from the queries that this device has.

    Args:
        static: see `ContextProgram`.
        cut: whether this device has only a part of the queries that are prefilled.
        layer: its number.
        q: queries `[R, H, E]` of rows that decode, and `[T + N, H, E]` of tokens that are prefilled, each or None.
        kv: of all tokens, `[R + T + N, K, E]`.
        pages, page, slot: see `pages.write`.
        decoding, prefilling: of the queries; None as those are.
    """
    pages = layout.write(pages, layer, page, slot, kv.k, kv.v)
    rows, chunk = q
    if rows is not None:
        rows = paged_decode(rows, pages, layer, *decoding, backend=static.backend)
    if chunk is not None:
        offsets = prefilling.offsets
        if cut:
            count = chunk.shape[0]
            offsets = jnp.clip(offsets - static.spread.number(QUERIES) * count, 0, count)
        ragged = prefilling.page_table, offsets, prefilling.kv_end
        chunk = paged_attention(chunk, pages, layer, *ragged, backend=static.backend)
    return (rows, chunk), pages


def _attention(static: ContextProgram, num_rows: int, num_chunk: int):
    """`_attend` with each device's own heads, and its own queries where they can be shared out evenly."""
    rows, chunk = (static.spread.even(count, QUERIES) for count in (num_rows, num_chunk))
    q = Spec(rows, HEADS), Spec(chunk, HEADS)
    whole = Spec()
    in_specs = whole, q, Spec(None, HEADS), PAGES, whole, whole, Spec(rows)
    in_specs = *in_specs, Prefilling(Spec(chunk), whole, whole) if num_chunk else None
    return static.spread.each(partial(_attend, static, chunk is not None), in_specs, (q, PAGES))


@program
def prefill(static: ContextProgram, arrays, pages, chunk: PrefillBatch):
    """Writes the keys and values of a chunk; returns something small that is there when they are, and the pages."""
    pages = advance(static.skeleton.merge(arrays), pages, None, None, chunk, static)[1]
    return static.spread.lay(chunk.offsets), static.spread.lay(pages, *PAGES)


@program
def mixed(static: ContextProgram, arrays, pages, rows: DecodeBatch, page_table, chunk: PrefillBatch, sampling):
    """One token for each row, and a chunk; returns the tokens chosen next, `[R, 1]`, and the pages."""
    logits, pages = advance(static.skeleton.merge(arrays), pages, rows, page_table, chunk, static)
    chosen = choose(logits, rows.count, sampling)[:, None]
    return static.spread.lay(chosen), static.spread.lay(pages, *PAGES)


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
    return *static.spread.lay((chosen, rows)), static.spread.lay(pages, *PAGES)


@partial(jax.jit, static_argnames=("skeleton", "spread"))
def embed_vit(skeleton, arrays, patches, position_ids, length, spread: Spread = ONE_DEVICE) -> jax.Array:
    """An image's patches `[N, patch patch 3]` -> trunk inputs `[N, D]`; `length` of the N are real.

    Compiled for each padded N, of which the published model has 34 up to its 4,900 patches.
    Patches are cut by what cuts a step's tokens, and the queries of attention by all of the mesh: the ViT's heads, of
    another number than the trunk's, are not.
    """
    count = patches.shape[0]
    more = spread.padded(count, AXES) - count
    patches, position_ids = jnp.pad(patches, ((0, more), (0, 0))), jnp.pad(position_ids, (0, more))
    attention = spread.each(attend, (Spec(AXES), Spec(), Spec(AXES)), Spec(AXES))
    model = skeleton.merge(arrays)
    return spread.lay(model.embed_vit(spread.lay(patches, TOKENS), position_ids, length, attention)[:count])


@convolution_program("skeleton", "room", "spread")
def encode_image(skeleton, arrays, pixels, noise, size, room: int, spread: Spread = ONE_DEVICE) -> jax.Array:
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
    pixels = spread.lay(pixels, IMAGE_ROWS)
    tokens = model.patchify_latents(model.autoencoder.encode(pixels[None], noise[None], size)[0])
    return spread.lay(jnp.pad(tokens, ((0, room - tokens.shape[0]), (0, 0))))


@partial(jax.jit, static_argnames=("skeleton", "spread"))
def embed_vae(skeleton, arrays, tokens, index, position_ids, spread: Spread = ONE_DEVICE) -> jax.Array:
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
    return spread.lay(jnp.where(index[:, None] < 0, jnp.zeros((), x.dtype), x))
