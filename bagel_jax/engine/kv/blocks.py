"""The pages that stage 1 denoises in: out of the same pool as contexts, as many as an image needs.

An image takes them when it is begun, and gives them back when it is done. A context that is to become one holds pages
meanwhile that only the image can free, so contexts leave room for the blocks of the largest of them: it could never be
begun otherwise.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from bagel_jax.engine.kv.pool import PagePool
from bagel_jax.engine.kv.prefix_cache import PrefixCache


class Blocks:
    """Which pages are blocks', and how many more are promised."""

    def __init__(self, pool: PagePool, prefixes: PrefixCache):
        self._pool, self._prefixes = pool, prefixes
        self._promised: dict[Hashable, int] = {}
        self._taken = 0

    @property
    def kept(self) -> int:
        """Pages that contexts leave free, so that the largest image that waits can be begun when none is in work."""
        return max(0, max(self._promised.values(), default=0) - self._taken)

    @property
    def home(self) -> bool:
        """Whether nothing is taken and nothing promised."""
        return not self._taken and not self._promised

    def promise(self, who: Hashable, count: int) -> None:
        """Keeps pages for an image whose context is begun; none of them is taken yet."""
        if count:
            self._promised[who] = count

    def forgo(self, who: Hashable) -> None:
        """A promise is no longer needed."""
        self._promised.pop(who, None)

    def take(self, count: int) -> list[int] | None:
        """Pages for an image's blocks; None where there are not so many."""
        if not self._prefixes.make_room(count):
            return None
        self._taken += count
        return self._pool.allocate(count)

    def give_back(self, pages: Sequence[int]) -> None:
        """What an image has taken and needs no more."""
        self._taken -= len(pages)
        self._pool.release(pages)

    def forget(self) -> None:
        """Knows nothing any more; the pages are given back by whoever knows the pool."""
        self._promised.clear()
        self._taken = 0
