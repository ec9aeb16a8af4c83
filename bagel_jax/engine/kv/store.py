"""The keys and values of a placement: one array of pages, who holds which, and finished prefixes.

Contexts in work, contexts that wait for stage 1, contexts that an image is made from, and prefixes kept for later are
leases on the same pages, so that a context lies on a device once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bagel_jax.config import BagelConfig
from bagel_jax.engine.kv.blocks import Blocks
from bagel_jax.engine.kv.pool import PagePool
from bagel_jax.engine.kv.prefix_cache import PrefixCache
from bagel_jax.errors import InputError
from bagel_jax.layout import NUM_MARKERS
from bagel_jax.pallas.paged_attention import pages as layout
from bagel_jax.placement.placement import Placement
from bagel_jax.placement.spread import PAGES
from bagel_jax.settings import EngineConfig

VIEWS = 3  # of a context at most: as many as there are guidance branches
# Tokens of text that a context is expected to have at most, the answer included, when pages are counted automatically.
_TEXT_TOKENS = 2048
SHARE = 0.8  # of the memory that weights leave on a TPU or GPU; the rest is for what programs need meanwhile
_COPIES = 8  # pages copied by one program


class KVStore:
    """Pages of keys and values on a placement.

    Args:
        placement: where they lie.
        config: the model's sizes.
        page_size: tokens a page.
        num_pages: how many.
        dtype: of keys and values.
    """

    def __init__(self, placement: Placement, config: BagelConfig, page_size: int, num_pages: int, dtype):
        self.placement, self.page_size, self.dtype = placement, page_size, dtype
        self.pool, self._config, self._num_pages = PagePool(num_pages), config, num_pages
        self.prefixes = PrefixCache(self.pool)
        self.blocks = Blocks(self.pool, self.prefixes)
        self.pages = self._empty()
        self.copy([(0, 0)])  # compiled now: the first request may not need it, and the next one should compile nothing

    def count(self, tokens: int) -> int:
        """Pages of so many tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """Pages for a context, for which kept prefixes go where they must; None where that is not enough."""
        return self.pool.allocate(count) if self.make_room(count) else None

    def make_room(self, count: int) -> bool:
        """Makes sure that so many pages are free for contexts, beside what is promised; says whether they are."""
        return self.prefixes.make_room(count, beside=self.blocks.kept)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies pages, each a pair (source, target), one after another."""
        for source, target in _groups(pairs):
            self.pages = _copy_pages(self.placement.spread, self.pages, source, target)

    def take(self, numbers: Sequence[int]) -> jax.Array:
        """A copy of some pages, `[L, n, K, 2, page, E]`, n a power of two; what is behind the last is padding."""
        return _take_pages(self.placement.spread, self.pages, _padded(numbers))

    def put(self, numbers: Sequence[int], pages: jax.Array) -> None:
        """Writes `pages` `[L, n, K, 2, page, E]` into those numbered; padding behind the last goes to page 0."""
        padded = np.zeros(pages.shape[1], np.int32)
        padded[: len(numbers)] = numbers
        self.pages = _put_pages(self.placement.spread, self.pages, padded, pages)

    def reset(self) -> None:
        """After a failure in which the pages were lost; whoever held some must have let go of them."""
        self.prefixes.clear()
        self.pages = self._empty()

    def forget(self) -> None:
        """Begins anew, whatever the books say."""
        self.pool.reset()
        self.prefixes.forget()
        self.blocks.forget()
        self.pages = self._empty()

    def check(self) -> None:
        """That every page is free or a kept prefix's, as it must be when nothing is in work.

        Raises:
            RuntimeError: a page is held by nobody that there is.
        """
        kept = self.prefixes.pages
        if self.pool.num_free + len(kept) != self.pool.num_pages:
            lost = self.pool.num_pages - self.pool.num_free - len(kept)
            raise RuntimeError(f"{lost} of {self.pool.num_pages} pages are held though nothing is in work")
        if not self.blocks.home:
            raise RuntimeError("pages are promised to images, or taken, though nothing is in work")

    def _empty(self) -> jax.Array:
        c = self._config.trunk
        shape = c.num_layers, self._num_pages, c.num_kv_heads, self.page_size, c.head_dim
        return layout.empty_pages(*shape, self.dtype, self.placement.pages())


def largest_context(config: BagelConfig, page_size: int, side: int | None = None) -> int:
    """Pages of the largest context that counts when pages are counted automatically: an edit of an image.

    Args:
        config: the model's.
        page_size: tokens a page.
        side: of the image, in latent tokens; the largest there may be if it is not given.
    """
    side = config.max_latent_size if side is None else side
    patches = min(config.max_vit_patches, -(-side * config.token_pixels // config.vit.patch_size))
    return -(-(side**2 + patches**2 + 2 * NUM_MARKERS + _TEXT_TOKENS) // page_size)


def block_pages(num_inside: int, page_size: int) -> int:
    """Pages of a noised block of so many latents, with the end of its context before it."""
    return -(-(num_inside + NUM_MARKERS) // page_size) + 1


def all_blocks(num_inside: int, page_size: int) -> int:
    """Pages of the blocks of an image of so many latents: one for each of as many views as there may be."""
    return VIEWS * block_pages(num_inside, page_size)


def page_bytes(config: BagelConfig, page_size: int, dtype, placement: Placement) -> int:
    """Bytes that one page takes of a device, in all layers."""
    c = config.trunk
    heads = c.num_kv_heads // placement.share_of_page()
    return c.num_layers * heads * 2 * page_size * c.head_dim * jnp.dtype(dtype).itemsize


def make_stores(
    placements: tuple[Placement, Placement], config: BagelConfig, settings: EngineConfig, dtype
) -> tuple[KVStore, KVStore]:
    """The stores of the two stages: the same one where they have the same placement.

    Pages are as many as `num_pages` says, or else enough for the largest contexts that may be in work in stage 0 and
    the blocks of the largest images in stage 1, or what memory allows. A placement of stage 1 alone has pages for as
    many of both as it may have images in work.

    Raises:
        InputError: there is no memory for so many pages.
    """
    context, denoise = placements
    own = context is denoise

    def store(place: Placement, **stages: bool) -> KVStore:
        budget, a_page = place.free_bytes(SHARE), page_bytes(config, settings.page_size, dtype, place)
        pages = count_pages(budget, a_page, config, settings, **stages)
        return KVStore(place, config, settings.page_size, pages, dtype)

    first = store(context, contexts=True, images=own)
    return first, first if own else store(denoise, contexts=False, images=True)


def count_pages(
    budget: int, a_page: int, config: BagelConfig, settings: EngineConfig, *, contexts: bool, images: bool
) -> int:
    """Pages of a store, page 0 among them.

    Args:
        budget: bytes of a device that pages may take.
        a_page: bytes of a page.
        config, settings: of the model and the engine.
        contexts: whether the store is stage 0's.
        images: whether it is stage 1's.

    Raises:
        InputError: that is too little.
    """
    affordable = budget // a_page
    if affordable < 2:
        raise InputError(
            f"the device has {max(budget, 0)} bytes left for the KV cache, and a page of {settings.page_size} tokens "
            f"takes {a_page}; give a smaller page_size or a larger device"
        )
    if contexts and settings.num_pages is not None:
        if settings.num_pages > affordable:
            raise InputError(
                f"num_pages is {settings.num_pages}, of {a_page} bytes each; the device has room for {affordable} "
                "beside all else, so give a smaller one"
            )
        return settings.num_pages
    requests = settings.ar_max_num_seqs if contexts else settings.dit_max_num_seqs
    wanted = 1 + requests * largest_context(config, settings.page_size)
    wanted += images * settings.dit_max_num_seqs * all_blocks(config.max_latent_size**2, settings.page_size)
    return min(wanted, affordable)


def _padded(numbers: Sequence[int]) -> np.ndarray:
    padded = np.zeros(1 << max(0, len(numbers) - 1).bit_length(), np.int32)
    padded[: len(numbers)] = numbers
    return padded


def _groups(pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pages to copy, source and target, in groups of one size, padded with page 0 onto itself.

    All pages of a group are read before any is written, so a page that was just written begins a new group.
    """
    groups: list[list[tuple[int, int]]] = []
    written: set[int] = set()
    for source, target in pairs:
        if not groups or len(groups[-1]) == _COPIES or {source, target} & written:
            groups.append([])
            written.clear()
        groups[-1].append((source, target))
        written.add(target)
    for group in groups:
        padded = np.zeros((_COPIES, 2), np.int32)
        padded[: len(group)] = group
        yield padded[:, 0], padded[:, 1]


@partial(jax.jit, static_argnames=("spread",), donate_argnames=("pages",))
def _copy_pages(spread, pages, source, target) -> jax.Array:
    return spread.lay(layout.copy_pages(pages, source, target), *PAGES)


@partial(jax.jit, static_argnames=("spread",))
def _take_pages(spread, pages, numbers) -> jax.Array:
    return spread.lay(layout.take_pages(pages, numbers), *PAGES)


@partial(jax.jit, static_argnames=("spread",), donate_argnames=("pages",))
def _put_pages(spread, pages, numbers, others) -> jax.Array:
    return spread.lay(layout.put_pages(pages, numbers, others), *PAGES)
