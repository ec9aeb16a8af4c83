"""Pages of the KV cache, on the host: who holds which, and how many there should be."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bagel_jax.config import BagelConfig
from bagel_jax.errors import InputError
from bagel_jax.settings import ServingSettings

# Tokens of text that a context is expected to have at most, the answer included, when pages are counted automatically.
_TEXT_TOKENS = 2048


class PagePool:
    """Which pages are free, and how many hold each of the others.

    Page 0 is never handed out: padding is written there. Running out is a value, not an exception.
    """

    def __init__(self, num_pages: int):
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


def context_pages(config: BagelConfig, page_size: int) -> int:
    """Pages of the largest context that counts when pages are counted automatically: an edit of the largest image."""
    image = (config.max_latent_size**2 + 2) + (config.max_vit_patches**2 + 2)
    return -(-(image + _TEXT_TOKENS) // page_size)


def page_bytes(config: BagelConfig, page_size: int, dtype) -> int:
    """Bytes of one page in all layers."""
    c = config.trunk
    return c.num_layers * c.num_kv_heads * 2 * page_size * c.head_dim * jnp.dtype(dtype).itemsize


def free_bytes(device: jax.Device, share: float) -> int:
    """A share of a device's free memory; on a CPU a quarter of the machine's."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(share * (stats["bytes_limit"] - stats["bytes_in_use"]))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def choose_num_pages(config: BagelConfig, settings: ServingSettings, dtype, device: jax.Device) -> int:
    """The number of pages that the settings give, or else one that suits the device, page 0 included.

    That is enough for as many of the largest contexts as may be in work at once, or what memory allows. On a TPU or
    GPU, pages may take 60 % of what the weights have left, so that there is room for stage 1; on a CPU a quarter of the
    machine's memory.

    Raises:
        InputError: there is no memory for so many pages, or not even for one.
    """
    wanted = settings.ar_max_num_seqs * context_pages(config, settings.page_size) + 1
    budget = free_bytes(device, 0.6)
    a_page = page_bytes(config, settings.page_size, dtype)
    affordable = budget // a_page
    if affordable < 2:
        raise InputError(
            f"the device has {budget} bytes left for the KV cache, and a page of {settings.page_size} tokens takes "
            f"{a_page}; give a smaller page_size or a larger device"
        )
    if settings.num_pages is None:
        return min(wanted, affordable)
    if settings.num_pages > affordable:
        raise InputError(
            f"num_pages is {settings.num_pages}, of {a_page} bytes each; the device has room for {affordable} beside "
            "all else, so give a smaller one"
        )
    return settings.num_pages
