"""Stage 1: contexts in, images out, for several requests at once, whatever their sizes, settings and progress."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from bagel_jax.clock import Span
from bagel_jax.config import BagelConfig
from bagel_jax.engine.denoise import steps as loop
from bagel_jax.engine.denoise.batch import batch_of, forecasts_of, padded_tokens, rows_of
from bagel_jax.engine.denoise.decoder import decode
from bagel_jax.engine.denoise.jobs import Work
from bagel_jax.engine.handoff import VIEWS, ContextKV, Failed
from bagel_jax.engine.kv.pool import PagePool, context_pages, free_bytes, page_bytes
from bagel_jax.errors import InputError
from bagel_jax.inputs.prepare import Prepared
from bagel_jax.inputs.tokenizer import Tokenizer
from bagel_jax.models.weights import Weights
from bagel_jax.pallas.paged_attention.pages import empty_pages
from bagel_jax.settings import ServingSettings, attention_backend


@dataclass(frozen=True)
class Steps:
    """How far a request is."""

    request_id: str
    done: int  # evaluations
    total: int


@dataclass(frozen=True)
class Drawn:
    """An image is done."""

    request_id: str
    latents: np.ndarray  # [N, C p²] float32
    pixels: np.ndarray  # [H, W, 3], about [-1, 1], not clipped
    spans: list[Span]


Event = Steps | Drawn | Failed


class DenoiseStage:
    """Denoises the images of several requests together.

    Args:
        weights: the model, on this stage's device.
        config: its sizes.
        dtype: of contexts.
        tokenizer: for the marker tokens.
        settings: see `ServingSettings`.

    Raises:
        InputError: the device has no memory for so many contexts.
    """

    def __init__(self, weights: Weights, config: BagelConfig, dtype, tokenizer: Tokenizer, settings: ServingSettings):
        self.weights, self.config, self.settings = weights, config, settings
        self.backend = attention_backend(settings.attention, weights.device.platform)
        self._markers = np.asarray([tokenizer.vision_start, tokenizer.vision_end], np.int32)
        slots = settings.dit_max_num_seqs
        self._largest = config.max_latent_size**2  # tokens
        largest = context_pages(config, settings.page_size) + VIEWS * self._block_pages(self._largest)
        self._num_pages = slots * largest + 1
        affordable = free_bytes(weights.device, 0.9) // page_bytes(config, settings.page_size, dtype)
        if self._num_pages > affordable:
            raise InputError(
                f"dit_max_num_seqs is {slots}, for which stage 1 needs {self._num_pages} pages; the device has "
                f"room for {affordable} beside all else, so give a smaller one"
            )
        self._pool = PagePool(self._num_pages)
        self._dtype = dtype
        self._state = self._empty_state()
        self._slots: list[Work | None] = [None] * slots
        self._suspects: list[Work] = []  # one of them made the device fail; they go on one by one
        self._pace: dict[tuple, float] = {}  # seconds an evaluation takes, by rows and tokens

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._works() or self._suspects)

    @property
    def place(self) -> jax.sharding.Sharding:
        """Where contexts must be."""
        return self.weights.arrays[0].sharding

    @property
    def free_slots(self) -> int:
        """Requests that can join now."""
        return 0 if self._suspects else self._slots.count(None)

    @property
    def free_pages(self) -> int:
        """Pages that are free for contexts."""
        return self._pool.num_free

    def pages_needed(self, prepared: Prepared, context_pages: int) -> int:
        """Pages that a request takes up here, for a context of so many and the blocks of its views.

        Raises:
            InputError: there are not so many.
        """
        pages = context_pages + VIEWS * self._block_pages(len(prepared.initial_latent))
        if pages > self._pool.num_pages:
            raise InputError(
                f"the request needs {pages} pages of {self.settings.page_size} tokens in stage 1, which has "
                f"{self._pool.num_pages}; give a shorter prompt or raise dit_max_num_seqs"
            )
        return pages

    def _block_pages(self, tokens: int) -> int:
        """Pages for a view's own block of so many latents, with the end of its context before it."""
        return -(-(tokens + 2) // self.settings.page_size) + 1

    def submit(self, prepared: Prepared, context: ContextKV) -> None:
        """Takes a request in, for which there must be room.

        Raises:
            InputError: the context is another request's, or of a model or a cache of other sizes.
        """
        self._check_context(prepared, context)
        self._start(Work.create(prepared, context))

    def cancel(self, request_id: str) -> bool:
        """Drops a request; False if it is not there (any more)."""
        for work in self._works():
            if work.request_id == request_id:
                self._release(work)
                return True
        for work in self._suspects:
            if work.request_id == request_id:
                self._suspects.remove(work)
                return True
        return False

    def step(self, seconds: float | None = None) -> list[Event]:
        """Takes all requests as many evaluations further as need the same rows, or as fit into about `seconds`.

        What fails in company is begun again alone, so that only whose fault it is fails.
        """
        if not self._works() and self._suspects:
            self._start(self._suspects.pop(0))
        works = self._works()
        try:
            return self._advance(works, seconds)
        except Exception as error:  # a device fails in any way it likes, and the others of the batch are to go on
            self._state = self._empty_state()
            for work in works:
                self._release(work)
                work.restart()
            if len(works) == 1:
                return [Failed(works[0].request_id, error)]
            self._suspects += works
            return []

    def _works(self) -> list[Work]:
        return [work for work in self._slots if work is not None]

    def _advance(self, works: Sequence[Work], seconds: float | None) -> list[Event]:
        if not works:
            return []
        started = time.perf_counter()
        steps = self._denoise(works, seconds)
        ended = time.perf_counter()
        for work in works:
            work.take(steps)
            work.spans.append(Span.here("denoise", started, ended))
        events: list[Event] = [Steps(work.request_id, work.done, work.total) for work in works]
        return events + self._finish([work for work in works if work.done == work.total])

    def _denoise(self, works: Sequence[Work], seconds: float | None) -> int:
        """Takes the requests further; returns by how many evaluations."""
        slots, count = len(self._slots), padded_tokens(works, self.config)
        rows, ahead = rows_of(works, slots), forecasts_of(works, slots)
        steps = min(work.steps_alike() for work in works)
        key = len(rows.slot), count, ahead is None
        if seconds is not None:
            steps = min(steps, max(1, int(seconds / self._pace.get(key, seconds))))
        self._state = self._with_terms(works, count)
        batch = batch_of(works, slots, count, self.config, self._markers)
        static = loop.Program(self.weights.skeleton, self.backend, count)
        started = time.perf_counter()
        state = loop.denoise(static, self.weights.arrays, self._state, batch, rows, ahead, np.int32(steps))
        self._state = jax.block_until_ready(state)
        pace = (time.perf_counter() - started) / steps
        self._pace[key] = min(pace, self._pace.get(key, pace))  # the first time, it compiles
        return steps

    def _finish(self, done: Sequence[Work]) -> list[Event]:
        """Images of finished requests, those of one size decoded together."""
        events: list[Event] = []
        by_grid: dict[tuple[int, int], list[tuple[Work, np.ndarray]]] = {}
        latents = np.asarray(self._state.latents) if done else None
        for work in done:
            mine = latents[work.slot, : work.tokens].copy()
            self._release(work)
            if np.isfinite(mine).all():
                by_grid.setdefault(work.prepared.latent_grid, []).append((work, mine))
            else:
                problem = "the latents are not finite; the weights or the settings are unusable"
                events.append(Failed(work.request_id, FloatingPointError(problem)))
        for grid, group in by_grid.items():
            try:
                events += self._decode(grid, group)
            except Exception:  # whoever it was, the others of that size have an image
                for one in group:
                    try:
                        events += self._decode(grid, [one])
                    except Exception as error:
                        events.append(Failed(one[0].request_id, error))
        return events

    def _decode(self, grid: tuple[int, int], group: Sequence[tuple[Work, np.ndarray]]) -> list[Event]:
        started = time.perf_counter()
        tokens = np.stack([mine for _, mine in group])
        images = decode(self.weights, tokens, grid, tiled=self.settings.vae_tiling)
        spent = Span.here("pixels", started, time.perf_counter())
        return [
            Drawn(work.request_id, mine, pixels, [*work.spans, spent])
            for (work, mine), pixels in zip(group, images, strict=True)
        ]

    def _check_context(self, prepared: Prepared, context: ContextKV) -> None:
        request_id = prepared.request.request_id
        if context.request_id != request_id:
            raise InputError(f"the context is of request {context.request_id!r}; it must be that of {request_id!r}")
        if context.image_shape != prepared.image_size:
            raise InputError(
                f"the context of {request_id!r} is for an image of {context.image_shape}; the request makes one of "
                f"{prepared.image_size}"
            )
        ours, theirs = self._state.pages.shape, context.pages.shape
        if (ours[0], *ours[2:]) != (theirs[0], *theirs[2:]):
            raise InputError(
                f"the context of {request_id!r} has pages of {[theirs[0], *theirs[2:]]}; this model and page_size "
                f"{self.settings.page_size} need {[ours[0], *ours[2:]]}"
            )

    def _start(self, work: Work) -> None:
        """Gives a request a slot, with its noise, and pages, with its context and room for the blocks of its views."""
        size, context = self.settings.page_size, work.context
        shared = np.asarray(context.page_table)
        own, blocks = context.num_pages, self._block_pages(work.tokens)
        pages = self._pool.allocate(own + blocks * len(shared))
        if pages is None:
            raise RuntimeError(f"a context of {own} pages was given where {self._pool.num_free} are free")
        numbers = np.zeros(context.pages.shape[1], np.int32)
        numbers[:own] = pages[:own]
        work.page_table = np.zeros((len(shared), shared.shape[1] + blocks), np.int32)
        source, target = np.zeros((2, VIEWS), np.int32)
        for view, length in enumerate(work.length):
            block = pages[own + blocks * view :][:blocks]
            whole = length // size
            work.page_table[view, :whole] = numbers[shared[view, :whole]]
            work.page_table[view, whole : whole + blocks] = block
            if length % size:
                source[view], target[view] = numbers[shared[view, whole]], block[0]
        noise = np.zeros(self._state.latents.shape[1:], np.float32)
        noise[: work.tokens] = work.prepared.initial_latent
        work.slot, work.pages = self._slots.index(None), pages
        cache = self.weights.place(context.pages)
        self._state = loop.join(self._state, np.int32(work.slot), noise, numbers, cache, source, target)
        self._slots[work.slot] = work

    def _release(self, work: Work) -> None:
        self._slots[work.slot] = None
        self._pool.release(work.pages)

    def _with_terms(self, works: Sequence[Work], count: int) -> loop.DenoiseState:
        """The state with room for the expansions of all requests that forecast, or without any if none does."""
        orders = [work.prepared.request.settings.taylorseer_order for work in works if work.courses is not None]
        old = self._state.terms
        if not orders:
            return self._state._replace(terms=None)
        there = (0, 0) if old is None else (old.shape[2], old.shape[3])
        wanted = max(there[0], 1 + max(orders)), max(there[1], count)
        if wanted == there:
            return self._state
        shape = len(self._slots), VIEWS, *wanted, self.config.trunk.hidden_size
        terms = self.weights.place(jnp.zeros(shape, self._dtype))
        if old is not None:
            terms = terms.at[:, :, : there[0], : there[1]].set(old)
        return self._state._replace(terms=terms)

    def _empty_state(self) -> loop.DenoiseState:
        c, slots = self.config.trunk, self.settings.dit_max_num_seqs
        shape = c.num_layers, self._num_pages, c.num_kv_heads, self.settings.page_size, c.head_dim
        latents = jnp.zeros((slots, self._largest, self.config.latent_dim))
        return loop.DenoiseState(*self.weights.place((latents, empty_pages(*shape, self._dtype))), None)
