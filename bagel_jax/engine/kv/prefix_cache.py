"""Finished contexts, found again by what is in them.

A context is known by a chain of hashes, one a segment: each is of the segment and of the hash before it. So a hash
stands for a whole prefix, and the pages kept under it hold all tokens of that prefix.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from bagel_jax.engine.kv.pool import PagePool
from bagel_jax.inputs.prepare import Prepared
from bagel_jax.layout import Segment, Text, VaeImage


def _digest(*parts: bytes | np.ndarray) -> bytes:
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            state.update(f"{part.shape}{part.dtype}".encode())
            part = np.ascontiguousarray(part).data
        state.update(part)
    return state.digest()


class Hasher:
    """Hashes the contexts of one request; each image is read once."""

    def __init__(self, prepared: Prepared):
        self._prepared = prepared
        self._images: dict[Segment, bytes] = {}

    def chain(self, segments: Iterable[Segment]) -> list[bytes]:
        """The hash of each prefix of whole segments.

        An image counts by its pixels, and for the autoencoder by the noise of its posterior sample too.
        """
        hashes, last = [], b""
        for segment in segments:
            last = _digest(last, self._content(segment))
            hashes.append(last)
        return hashes

    def _content(self, segment: Segment) -> bytes:
        if isinstance(segment, Text):
            return _digest(b"text", np.asarray(segment.ids, np.int32))
        if segment not in self._images:
            image = self._prepared.images[segment.image]
            if isinstance(segment, VaeImage):
                noise = self._prepared.posterior_noise[segment.image]
                self._images[segment] = _digest(b"vae", image.vae_pixels, noise)
            else:
                grid = np.asarray(image.vit_grid, np.int32)
                self._images[segment] = _digest(b"vit", image.vit_patches, grid)
        return self._images[segment]


class _Kept(NamedTuple):
    pages: list[int]  # the last one may hold other tokens behind the prefix's
    length: int


class PrefixCache:
    """Pages of finished prefixes, held until they are needed for something else; the least recently used go first."""

    def __init__(self, pool: PagePool):
        self._pool = pool
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()

    @property
    def pages(self) -> set[int]:
        """All pages that are kept."""
        return {page for kept in self._kept.values() for page in kept.pages}

    def find(self, chain: Sequence[bytes]) -> tuple[list[int], int]:
        """Pages and number of tokens of the longest prefix that is there; the pages stay the cache's."""
        for i in range(len(chain) - 1, -1, -1):
            kept = self._kept.get(chain[i])
            if kept is not None:
                # Shorter prefixes, which serve more requests, last: they are to stay longer.
                for key in reversed(chain[: i + 1]):
                    if key in self._kept:
                        self._kept.move_to_end(key)
                return kept
        return [], 0

    def keep(self, key: bytes, pages: Sequence[int], length: int) -> None:
        """Holds the pages of a finished prefix, unless it is there already."""
        if key not in self._kept:
            self._pool.share(pages)
            self._kept[key] = _Kept(list(pages), length)

    def make_room(self, count: int, beside: int = 0) -> bool:
        """Lets go of prefixes until `count` pages are free, if that is enough; says whether they are.

        It is not enough unless `beside` more could be made free after them.
        """
        if self._pool.num_free >= count + beside:
            return True
        # Pages that others hold too do not become free, and prefixes that go in vain are computed again.
        holds = Counter(page for kept in self._kept.values() for page in kept.pages)
        unused = sum(self._pool.holders(page) == number for page, number in holds.items())
        if self._pool.num_free + unused < count + beside:
            return False
        while self._pool.num_free < count:
            self._pool.release(self._kept.popitem(last=False)[1].pages)
        return True

    def clear(self) -> None:
        """Lets go of everything."""
        while self._kept:
            self._pool.release(self._kept.popitem()[1].pages)

    def forget(self) -> None:
        """Knows nothing any more; the pages are given back by whoever knows the pool."""
        self._kept.clear()
