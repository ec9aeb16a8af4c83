"""What crosses from stage 0 to stage 1: the context of one request, known by the request's id.

On one placement it is a `Lease` of pages that stay where they are; to another placement, or to a file, `ContextKV`
carries their contents.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bagel_jax.engine.kv.store import KVStore
from bagel_jax.errors import InputError
from bagel_jax.layout import KVPrefix

_FORMAT = "bagel_jax context"
_VERSION = 2


@dataclass(frozen=True)
class Views:
    """What the guidance branches of a request see: those that see the same are one view. View 0 is the full context."""

    request_id: str
    image_shape: tuple[int, int]  # height and width in pixels of the image to make
    drop_text: int  # the view of the branch without the last text
    drop_image: int  # the view of the branch without images
    length: np.ndarray  # [V] int32, tokens that a view sees
    rope: np.ndarray  # [V] int32, RoPE position of the view's noised block

    @classmethod
    def of(
        cls, request_id: str, image_shape: tuple[int, int], prefixes: tuple[KVPrefix, KVPrefix, KVPrefix]
    ) -> tuple[Views, list[KVPrefix]]:
        """The views of the three branches, and the prefix that each view is."""
        views = list(dict.fromkeys(prefixes))
        length, rope = (np.asarray([getattr(v, name) for v in views], np.int32) for name in ("length", "rope"))
        return cls(request_id, image_shape, *(views.index(one) for one in prefixes[1:]), length, rope), views


@dataclass(eq=False)
class Lease:
    """A finished context on a store's pages, held until `release`."""

    store: KVStore
    views: Views
    view_pages: list[list[int]]  # of each view, its pages in order; views share them

    @classmethod
    def hold(cls, store: KVStore, views: Views, view_pages: list[list[int]]) -> Lease:
        """Takes hold of pages that somebody else holds too."""
        lease = cls(store, views, view_pages)
        store.pool.share(lease.pages)
        return lease

    @property
    def pages(self) -> list[int]:
        """All pages, each once."""
        return list(dict.fromkeys(page for pages in self.view_pages for page in pages))

    def release(self) -> None:
        """Lets go of the pages; what they hold may be overwritten by what is dispatched from now on."""
        self.store.pool.release(self.pages)

    def export(self) -> ContextKV:
        """The context in arrays of its own."""
        own = self.pages
        numbers = {page: i for i, page in enumerate(own)}
        table = np.zeros((len(self.view_pages), max(1, *map(len, self.view_pages), 1)), np.int32)
        for row, pages in zip(table, self.view_pages, strict=True):
            row[: len(pages)] = [numbers[page] for page in pages]
        v = self.views
        return ContextKV(
            self.store.take(own), table, v.length, v.rope, v.request_id, v.image_shape, v.drop_text, v.drop_image
        )

    def moved(self, store: KVStore) -> Lease | None:
        """The context on another store's pages, and no longer on these; None where there is no room for it.

        Raises:
            Exception: whatever devices raise; then the context is where it was.
        """
        if store is self.store:
            return self
        if not store.make_room(len(self.pages)):
            return None
        moved = self.export().lease(store)
        if moved is not None:
            self.release()
        return moved


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("pages", "page_table", "length", "rope"),
    meta_fields=("request_id", "image_shape", "drop_text", "drop_image"),
)
@dataclass(frozen=True)
class ContextKV:
    """The context of one request in arrays: the fields of `Views`, and pages.

    A pytree, which `jax.device_put` moves whole; for `jax.jit` what names the request is static, so programs should be
    given the arrays.
    """

    pages: jax.Array  # [L, n, K, 2, page, E], in the layout of `pallas/paged_attention/pages.py`
    page_table: jax.Array  # [V, m] int32, each view's pages among the n, in order; behind its length 0
    length: jax.Array  # [V] int32
    rope: jax.Array  # [V] int32
    request_id: str
    image_shape: tuple[int, int]
    drop_text: int
    drop_image: int

    def __post_init__(self):
        # Inside JAX's own transformations a pytree may hold anything in place of its arrays.
        if not all(hasattr(x, "shape") for x in (self.page_table, self.length, self.rope)):
            return
        views = self.page_table.shape[:1]
        branch_views = min(self.drop_text, self.drop_image) >= 0 and max(self.drop_text, self.drop_image) < views[0]
        if self.length.shape != views or self.rope.shape != views or not branch_views:
            raise ValueError(
                f"the context of {self.request_id} has tables of {views[0]} views, lengths of {self.length.shape}, "
                f"positions of {self.rope.shape} and branches {self.drop_text} and {self.drop_image}"
            )

    @property
    def num_pages(self) -> int:
        """Pages that hold something; those behind them are padding."""
        return 1 + int(np.max(self.page_table))

    @property
    def views(self) -> Views:
        """What the branches see."""
        length, rope = np.asarray(self.length), np.asarray(self.rope)
        return Views(self.request_id, self.image_shape, self.drop_text, self.drop_image, length, rope)

    def move(self, place: Any) -> ContextKV:
        """The context on other devices, a device or a sharding; where it is already nothing moves."""
        return dataclasses.replace(self, pages=jax.device_put(self.pages, place))

    def lease(self, store: KVStore) -> Lease | None:
        """The context on a store's pages; None where there is no room for it.

        Raises:
            Exception: whatever devices raise; then no page is taken.
        """
        numbers = store.allocate(self.num_pages)
        if numbers is None:
            return None
        try:
            store.put(numbers, self.move(store.placement.pages()).pages)
            table = np.asarray(self.page_table)
            used = [store.count(int(length)) for length in self.length]
            pages = [[numbers[i] for i in row[:count]] for row, count in zip(table, used, strict=True)]
            return Lease.hold(store, self.views, pages)
        finally:
            store.pool.release(numbers)  # what no view sees is free, and all of it where it could not be laid down

    def save(self, path: str | Path) -> None:
        """Writes the context to a safetensors file, for another process to denoise."""
        named = {name: getattr(self, name) for name in ("request_id", "image_shape", "drop_text", "drop_image")}
        arrays = {name: np.asarray(getattr(self, name)) for name in ("pages", "page_table", "length", "rope")}
        metadata = {"format": _FORMAT, "version": str(_VERSION), "context": json.dumps(named)}
        save_file(arrays, path, metadata)

    @classmethod
    def load(cls, path: str | Path) -> ContextKV:
        """Reads what `save` wrote.

        Raises:
            InputError: the file cannot be read, is none of ours, is damaged, or of another version.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise InputError(f"context {path} cannot be read ({error}); ContextKV.save writes one") from None
        if metadata.get("format") != _FORMAT:
            raise InputError(f"{path} is not a saved context; ContextKV.save writes one")
        if metadata.get("version") != str(_VERSION):
            raise InputError(
                f"context {path} is of version {metadata.get('version')}; this program reads version {_VERSION}, so "
                "compute it again"
            )
        try:
            named = json.loads(metadata["context"])
            context = cls(**arrays, **named | {"image_shape": tuple(named["image_shape"])})
            if context.num_pages > context.pages.shape[1] or context.page_table.min() < 0:
                raise ValueError(f"a table names page {context.num_pages - 1} of {context.pages.shape[1]}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"context {path} is damaged ({error}); compute it again") from None
        return context


def check_context(context: ContextKV, request_id: str, image_size: Sequence[int], store: KVStore) -> None:
    """That a context which was given is a request's, and of a store's form.

    Raises:
        InputError: it is another request's, or of a model or a cache of other sizes.
    """
    if context.request_id != request_id:
        raise InputError(f"the context is of request {context.request_id!r}; it must be that of {request_id!r}")
    if context.image_shape != image_size:
        raise InputError(
            f"the context of {request_id!r} is for an image of {context.image_shape}; the request makes one of "
            f"{image_size}"
        )
    needed, found = store.pages.shape, context.pages.shape
    if (needed[0], *needed[2:]) != (found[0], *found[2:]):
        raise InputError(
            f"the context of {request_id!r} has pages of {[found[0], *found[2:]]}; this model and page_size "
            f"{store.page_size} need {[needed[0], *needed[2:]]}"
        )
    table, length = np.asarray(context.page_table), np.asarray(context.length)
    there = np.all((length >= 0) & (length <= table.shape[1] * store.page_size))  # false for what is no number
    if not there or table.min() < 0 or context.num_pages > found[1]:
        raise InputError(
            f"the context of {request_id!r} is damaged (views of {length.tolist()} tokens, {table.shape[1]} pages "
            f"each, of {found[1]} in all); compute it again"
        )
    if context.num_pages > store.pool.num_pages:
        raise InputError(
            f"the context of {request_id!r} has {context.num_pages} pages; stage 1 has {store.pool.num_pages}, so "
            "raise dit_max_num_seqs or num_pages"
        )
