"""Pages of the KV cache, on the host: who holds which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class PagePool:
    """Which pages are free, and how many hold each of the others.

    Page 0 is never handed out: padding is written there. Running out is a value, not an exception.
    """

    def __init__(self, num_pages: int):
        self._reset(num_pages)

    def reset(self) -> None:
        """Nobody holds anything."""
        self._reset(len(self._holders))

    def _reset(self, num_pages: int) -> None:
        self._holders = np.zeros(num_pages, np.int32)
        self._holders[0] = 1
        self._free = np.arange(num_pages - 1, 0, -1, dtype=np.int32)
        self._num_free = num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return self._num_free

    @property
    def num_pages(self) -> int:
        """Pages that can be handed out."""
        return len(self._holders) - 1

    def holders(self, page: int) -> int:
        """How many hold a page."""
        return int(self._holders[page])

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one holder each, or None where there are not so many."""
        if count > self._num_free:
            return None
        self._num_free -= count
        pages = self._free[self._num_free : self._num_free + count][::-1]
        self._holders[pages] = 1
        return pages.tolist()

    def share(self, pages: Sequence[int]) -> None:
        """One holder more for each page."""
        held = np.asarray(pages, np.int32)
        if (self._holders[held] == 0).any():
            raise RuntimeError("a page that nobody holds cannot be shared")
        self._holders[held] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each page; what nobody holds any more is free."""
        held = np.asarray(pages, np.int32)
        if (self._holders[held] == 0).any() or (held == 0).any():
            raise RuntimeError("a page that nobody holds cannot be released")
        self._holders[held] -= 1
        freed = held[self._holders[held] == 0]
        self._free[self._num_free : self._num_free + len(freed)] = freed
        self._num_free += len(freed)
