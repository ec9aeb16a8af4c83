"""Random ragged batches of paged sequences, and the truth about them in NumPy: the base of all tests of backends."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


@dataclass
class Batch:
    """Sequences in pages; the last tokens of each are the queries. Wherever no token lives is NaN."""

    q: np.ndarray  # [T, H, E]
    pages: np.ndarray  # [L, P, K, 2, page, E]
    layer: int
    page_table: np.ndarray  # [R, n]
    query_offsets: np.ndarray  # [R + 1]
    kv_end: np.ndarray  # [T]
    sequences: list[tuple[np.ndarray, np.ndarray]]  # keys and values [S, K, E] of each

    def arguments(self, dtype="float32"):
        """What `paged_attention` takes, on the device."""
        return (
            jnp.asarray(self.q, dtype),
            jnp.asarray(self.pages, dtype),
            jnp.int32(self.layer),
            jnp.asarray(self.page_table, jnp.int32),
            jnp.asarray(self.query_offsets, jnp.int32),
            jnp.asarray(self.kv_end, jnp.int32),
        )

    def decode(self, dtype="float32"):
        """What `paged_decode` takes, for a batch of `draw_decode`."""
        q, pages, layer, table, _, kv_end = self.arguments(dtype)
        return q, pages, layer, table, kv_end

    def blocks(self, dtype="float32"):
        """What `paged_blocks` takes, for a batch of `draw_blocks`."""
        q, pages, layer, table, _, kv_end = self.arguments(dtype)
        rows = len(table)
        return q.reshape(rows, -1, *q.shape[1:]), pages, layer, table, kv_end.reshape(rows, -1)[:, 0]

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Output `[T, H, E]` and log-sum-exp `[T, H]` in float64."""
        heads, width = self.q.shape[1:]
        out, lse = np.zeros(self.q.shape), np.full(self.q.shape[:2], -np.inf)
        for r, (k, v) in enumerate(self.sequences):
            for t in range(self.query_offsets[r], self.query_offsets[r + 1]):
                end = self.kv_end[t]
                for h in range(heads if end else 0):
                    own = h // (heads // k.shape[1])
                    scores = k[:end, own].astype(np.float64) @ self.q[t, h] / np.sqrt(width)
                    weights = np.exp(scores - scores.max())
                    out[t, h] = weights @ v[:end, own] / weights.sum()
                    lse[t, h] = np.log(weights.sum()) + scores.max()
        return out, lse


def random_kv_end(generator, length: int) -> np.ndarray:
    """A staircase over `length` tokens: text tokens and image blocks in any order."""
    ends: list[int] = []
    while len(ends) < length:
        size = int(generator.integers(1, length - len(ends) + 1))
        start = len(ends)
        if generator.random() < 0.5:
            ends += [start + size] * size
        else:
            ends += range(start + 1, start + size + 1)
    return np.asarray(ends, np.int32)


def rounded(generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Random numbers that `dtype` has, so that the truth is about the same ones."""
    return np.asarray(jnp.asarray(generator.standard_normal(shape), dtype).astype(jnp.float32))


def draw(
    seed: int,
    lengths: list[int],
    num_queries: list[int] | None = None,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 16,
    page: int = 16,
    padding: int = 3,
    dtype: str = "float32",
    num_pages: int = 0,
    table_width: int = 0,
) -> Batch:
    """A batch of sequences of these `lengths`, each with that many queries (None: any number) at its end.

    `num_pages` and `table_width` are the least that there shall be: batches of equal shapes compile once.
    """
    generator = np.random.default_rng(seed)
    if num_queries is None:
        num_queries = [int(generator.integers(0, n + 1)) for n in lengths]

    def normal(*shape):
        return rounded(generator, shape, dtype)

    counts = [-(-n // page) for n in lengths]
    layers, layer = 2, 1
    num_pages = max(num_pages, sum(counts) + 3)
    pages = np.full((layers, num_pages, kv_heads, 2, page, width), np.nan, np.float32)
    free = generator.permutation(np.arange(1, num_pages))
    # Entries behind a sequence's last page are 0, as the pool leaves them, or point anywhere.
    table_width = max(table_width, max(counts, default=0) + 2)
    table = generator.integers(0, num_pages, (len(lengths), table_width)) * generator.integers(0, 2)
    queries, ends, sequences = [], [], []
    for r, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        own, free = free[:count], free[count:]
        table[r, :count] = own
        k, v = normal(length, kv_heads, width), normal(length, kv_heads, width)
        for i in range(length):
            pages[layer, own[i // page], :, 0, i % page] = k[i]
            pages[layer, own[i // page], :, 1, i % page] = v[i]
        sequences.append((k, v))
        queries.append(normal(num_queries[r], heads, width))
        ends.append(random_kv_end(generator, length)[length - num_queries[r] :])
    offsets = np.concatenate([[0], np.cumsum(num_queries)]).astype(np.int32)
    q = np.concatenate([*queries, np.zeros((padding, heads, width), np.float32)])
    kv_end = np.concatenate([*ends, np.zeros(padding, np.int32)]).astype(np.int32)
    return Batch(q, pages, layer, table.astype(np.int32), offsets, kv_end, sequences)


def draw_blocks(seed: int, contexts: list[int], blocks: list[int], num_queries: int, **sizes) -> Batch:
    """Rows of stage 1: in each, all queries see a context and a block right behind it.

    Every row has `num_queries`, those beyond the tokens of its block are padding; a block of 0 is a row of padding.
    """
    ends = [context + block if block else 0 for context, block in zip(contexts, blocks, strict=True)]
    total = len(ends) * num_queries
    batch = draw(seed, ends, [0] * len(ends), padding=total, **sizes)
    batch.q = rounded(np.random.default_rng(seed), batch.q.shape, sizes.get("dtype", "float32"))
    batch.kv_end = np.repeat(np.asarray(ends, np.int32), num_queries)
    batch.query_offsets = np.arange(0, total + 1, num_queries, dtype=np.int32)
    return batch


def draw_decode(seed: int, lengths: list[int], **sizes) -> Batch:
    """One query a sequence, which sees all of it; a length of 0 is a row of padding."""
    batch = draw(seed, lengths, [min(1, n) for n in lengths], padding=0, **sizes)
    rows = np.zeros((len(lengths), *batch.q.shape[1:]), np.float32)
    rows[[i for i, n in enumerate(lengths) if n]] = batch.q
    batch.q, batch.kv_end = rows, np.asarray(lengths, np.int32)
    batch.query_offsets = np.arange(len(lengths) + 1, dtype=np.int32)
    return batch
