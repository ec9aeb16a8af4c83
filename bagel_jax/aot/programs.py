"""Every program of the published model at full size, with shapes in place of arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bagel_jax.aot.published import PUBLISHED
from bagel_jax.buckets import power_of_two
from bagel_jax.config import BagelConfig
from bagel_jax.engine import nobody
from bagel_jax.engine.context import steps
from bagel_jax.engine.context.scheduler import TEXT_BESIDE_IMAGE
from bagel_jax.engine.context.stage import MAX_CONTEXT
from bagel_jax.engine.denoise.batch import LEAST_WIDTH, padded_rows, padded_tokens
from bagel_jax.engine.denoise.decoder import decode_latents
from bagel_jax.engine.denoise.steps import DenoiseProgram, DenoiseState, denoise
from bagel_jax.engine.kv.store import all_blocks, block_pages, largest_context, page_bytes
from bagel_jax.engine.precompile import input_sizes
from bagel_jax.layout import NUM_MARKERS
from bagel_jax.models.layers import stack, unrolled
from bagel_jax.models.weights import Weights, abstract_weights, flatten
from bagel_jax.placement.placement import Placement
from bagel_jax.placement.spread import DATA, HEADS, QUERIES
from bagel_jax.settings import EngineConfig, attention_backend

PAGE = EngineConfig().page_size
TEXT = 512  # tokens of text in a context
DECODED = 8192  # tokens of context that a row attends to which decodes


class Program(NamedTuple):
    """Something to compile."""

    name: str
    trace: Callable[[], Any]  # gives a `jax.stages.Traced`
    # Of attention over pages, in one pass over all layers: what its kernels do is in no cost analysis.
    attention_flops: float = 0  # of a device
    kv_bytes: float = 0  # read by a device


class Model:
    """The published model on a placement, abstractly.

    Args:
        placement: over devices that need not be here.
        dtype: of weights, and of keys and values.
        size: side in pixels of the larger images; the smaller ones have 512.
        config: of the model.
    """

    def __init__(self, placement: Placement, dtype, size: int, config: BagelConfig = PUBLISHED):
        self.placement, self.config, self.size, self.dtype = placement, config, size, jnp.dtype(dtype)
        self.spread, platform = placement.spread, placement.platform
        self.backend = attention_backend("pallas", platform)
        # As `Weights.for_serving`.
        self.weights = abstract_weights(config, dtype, unrolled if platform == "gpu" else stack)
        self.slots = EngineConfig().dit_max_num_seqs
        # The largest edits that stage 1 may have in work: their contexts and blocks.
        blocks = all_blocks(config.max_latent_size**2, PAGE)
        self.num_pages = 1 + self.slots * (largest_context(config, PAGE) + blocks)
        c = config.trunk
        self.pages = self._of(
            (c.num_layers, self.num_pages, c.num_kv_heads, 2, PAGE, c.head_dim), dtype, placement.pages()
        )
        self.arrays = self._placed(self.weights)

    @property
    def weight_bytes(self) -> int:
        """Of a device."""
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in self.arrays)

    @property
    def page_bytes(self) -> int:
        """Of all pages, on a device."""
        return self.num_pages * page_bytes(self.config, PAGE, self.dtype, self.placement)

    def programs(self) -> Iterator[Program]:
        """All of them, in the order in which a request meets them."""
        c = self.config
        patches, tokens, grids = input_sizes(c, ((self.size, self.size),))
        (patches,), (tokens,), (grid,) = patches, tokens, grids
        yield Program(f"ViT, {patches} patches", partial(self._vit, patches))
        yield Program(f"VAE encoder, {self.size}²", partial(self._encode, grid))
        for count in (64, 128, 256, 512, 1024, 2048):
            yield self._prefill(f"prefill, text of {count}", count, None)
        yield self._prefill(f"prefill, VAE block of {tokens}", TEXT_BESIDE_IMAGE, tokens, latents=True)
        yield self._prefill(f"prefill, ViT block of {patches}", TEXT_BESIDE_IMAGE, patches)
        yield from (self._decode(count) for count in (1, 8, 64))
        for size in sorted({512, self.size}):
            for requests in (1, 2):
                yield from (self._denoise(size, requests, rows) for rows in (2, 3))
        for size in sorted({512, self.size}):
            yield Program(f"VAE decoder, {size}²", partial(self._pixels, size // c.token_pixels))

    def _of(self, shape, dtype, sharding=None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or self.placement.sharding())

    def _placed(self, weights: Weights) -> tuple[jax.ShapeDtypeStruct, ...]:
        by_path = {x: path for path, x in ((path, id(leaf)) for path, leaf in flatten(weights.params).items())}
        return tuple(
            self._of(x.shape, x.dtype, self.placement.parameter(by_path[id(x)], x.shape)) for x in weights.arrays
        )

    def _abstract(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: self._of(np.shape(x), x.dtype), tree)

    def _vit(self, count: int):
        patches = self._abstract(nobody.patches(self.config, count))
        return steps.embed_vit.trace(self.weights.skeleton, self.arrays, *patches, self.spread)

    def _encode(self, grid: tuple[int, int]):
        program, image = steps.encode_image.on(self.placement.platform), nobody.image(self.config, grid)
        room = self.config.max_latent_size**2
        return program.trace(self.weights.skeleton, self.arrays, *self._abstract(image), room, self.spread)

    def _pixels(self, side: int):
        program = decode_latents.on(self.placement.platform)
        tokens = self._of((1, side, side, self.config.latent_dim), jnp.float32)
        return program.trace(
            self.weights.skeleton, self.arrays, tokens, self._of((1, 2), jnp.int32), spread=self.spread
        )

    def _prefill(self, name: str, text: int, image: int | None, *, latents: bool = False) -> Program:
        static = steps.ContextProgram(self.weights.skeleton, self.backend, latents, self.spread)
        block = None if image is None else self._of((image, self.config.trunk.hidden_size), self.dtype)
        chunk = nobody.prefilling(text, block, -(-MAX_CONTEXT // PAGE))
        count = text + (image or 0)
        pairs = text**2 / 2 + (image or 0) * (TEXT + (image or 0))
        parts = self.spread.parts(HEADS) * self._cuts(count, QUERIES)
        seen = count + (TEXT if image else 0)
        return Program(
            name,
            lambda: steps.prefill.trace(static, self.arrays, self.pages, self._abstract(chunk)),
            self._attention(pairs) / parts,
            self._kv(seen),
        )

    def _decode(self, rows: int) -> Program:
        static = steps.ContextProgram(self.weights.skeleton, self.backend, spread=self.spread)
        arguments = nobody.decoding(rows, -(-MAX_CONTEXT // PAGE))
        numbers = np.int32(0), np.int32(1)
        cut = self._cuts(rows, QUERIES)
        return Program(
            f"decode, {rows} row{'s' if rows > 1 else ''}",
            lambda: steps.decode.trace(static, self.arrays, self.pages, *self._abstract((*arguments, *numbers))),
            self._attention(rows * DECODED) / self.spread.parts(HEADS) / cut,
            self._kv(rows * DECODED) / cut,
        )

    def _denoise(self, size: int, requests: int, rows: int) -> Program:
        c, all_rows = self.config, padded_rows(requests * rows)
        inside = (size // c.token_pixels) ** 2
        count = padded_tokens(inside, c, self.spread)
        most = TEXT + inside + c.max_vit_patches**2 + 2 * NUM_MARKERS
        width = power_of_two(-(-most // PAGE) + block_pages(inside, PAGE), LEAST_WIDTH)
        largest = padded_tokens(c.max_latent_size**2, c, self.spread)
        markers = np.zeros(2, np.int32)
        batch, views = nobody.denoising(c, self.slots, count, all_rows, width, markers)
        static = DenoiseProgram(self.weights.skeleton, self.backend, count, self.spread)
        latents = self._of((self.slots, largest, c.latent_dim), jnp.float32)
        state = DenoiseState(latents, self.pages, None)
        rest = self._abstract((batch, views)), self._of((), jnp.int32)
        seen = most + inside
        by_row = self._cuts(all_rows, DATA)
        parts = self.spread.parts(HEADS) * self.spread.parts(QUERIES)  # what cuts no rows cuts tokens
        return Program(
            f"denoise {size}², {rows} rows" + (f" x {requests} requests" if requests > 1 else ""),
            lambda: denoise.trace(static, self.arrays, state, *rest[0], None, rest[1]),
            self._attention(all_rows * inside * seen) / parts,
            self._kv(all_rows * seen) / by_row,
        )

    def _cuts(self, count: int, axes) -> int:
        return self.spread.parts(axes) if self.spread.even(count, axes) else 1

    def _attention(self, pairs: float) -> float:
        """Operations of attention between so many pairs of a query and a key, in all layers and heads."""
        c = self.config.trunk
        return 4 * pairs * c.num_layers * c.num_heads * c.head_dim

    def _kv(self, tokens: float) -> float:
        """Bytes of the keys and values of so many tokens that a device reads."""
        return tokens / PAGE * page_bytes(self.config, PAGE, self.dtype, self.placement)
