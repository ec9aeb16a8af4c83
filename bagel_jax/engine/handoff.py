"""What crosses from stage 0 to stage 1: the context of one request, known by the request's id."""

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

from bagel_jax.errors import InputError
from bagel_jax.layout import KVPrefix

VIEWS = 3  # of a context at most: as many as there are guidance branches
_FORMAT = "bagel_jax context"
_VERSION = 1


@dataclass(frozen=True)
class Failed:
    """A request that is given up, and why. What waits for its context or its image learns it from this at once."""

    request_id: str
    error: Exception


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("pages", "page_table", "length", "rope"),
    meta_fields=("request_id", "image_shape", "text_view", "img_view"),
)
@dataclass(frozen=True)
class ContextKV:
    """The context of one request, for every guidance branch that differs from the others.

    View 0 is the full context. Branches that see the same are one view, and views share the pages that they have in
    common. A pytree, which `jax.device_put` moves whole; for `jax.jit` what names the request is static, so programs
    should be given the arrays.
    """

    pages: jax.Array  # [L, n, K, 2, page, E], in the layout of `pallas/paged_attention/pages.py`
    page_table: jax.Array  # [V, m] int32, each view's pages among the n, in order; behind its length 0
    length: jax.Array  # [V] int32, tokens that a view sees
    rope: jax.Array  # [V] int32, RoPE position of the view's latent block
    request_id: str
    image_shape: tuple[int, int]  # height and width in pixels of the image to make
    text_view: int  # the view of the branch without the last text
    img_view: int  # the view of the branch without images

    def __post_init__(self):
        # Inside JAX's own transformations a pytree may hold anything in place of its arrays.
        if not all(hasattr(x, "shape") for x in (self.page_table, self.length, self.rope)):
            return
        views = self.page_table.shape[:1]
        branch_views = min(self.text_view, self.img_view) >= 0 and max(self.text_view, self.img_view) < views[0]
        if self.length.shape != views or self.rope.shape != views or not branch_views:
            raise ValueError(
                f"the context of {self.request_id} has tables of {views[0]} views, lengths of {self.length.shape}, "
                f"positions of {self.rope.shape} and branches {self.text_view} and {self.img_view}"
            )

    @property
    def num_pages(self) -> int:
        """Pages that hold something; those behind them are padding."""
        return 1 + int(np.max(self.page_table))

    def move(self, place: Any) -> ContextKV:
        """The context on the devices of another stage, a device or a sharding; where it is already nothing moves."""
        return dataclasses.replace(self, pages=jax.device_put(self.pages, place))

    def save(self, path: str | Path) -> None:
        """Writes the context to a safetensors file, for another process to denoise."""
        about = {name: getattr(self, name) for name in ("request_id", "image_shape", "text_view", "img_view")}
        arrays = {name: np.asarray(getattr(self, name)) for name in ("pages", "page_table", "length", "rope")}
        metadata = {"format": _FORMAT, "version": str(_VERSION), "context": json.dumps(about)}
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
            about = json.loads(metadata["context"])
            context = cls(**arrays, **about | {"image_shape": tuple(about["image_shape"])})
            if context.num_pages > context.pages.shape[1] or context.page_table.min() < 0:
                raise ValueError(f"a table names page {context.num_pages - 1} of {context.pages.shape[1]}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"context {path} is damaged ({error}); compute it again") from None
        return context


def branches(main: KVPrefix, text: KVPrefix, img: KVPrefix) -> tuple[list[KVPrefix], int, int]:
    """The views of the three guidance branches without repetition, and which the second and third branch have."""
    views = list(dict.fromkeys((main, text, img)))
    return views, views.index(text), views.index(img)


def tables(views: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Pages of the pool that views have, `[n]`, each once, and the views' tables `[V, m]` of places in there."""
    places: dict[int, int] = {}
    for pages in views:
        for page in pages:
            places.setdefault(page, len(places))
    table = np.zeros((len(views), max(1, *(len(pages) for pages in views))), np.int32)
    for row, pages in zip(table, views, strict=True):
        row[: len(pages)] = [places[page] for page in pages]
    return np.asarray(list(places), np.int32), table
