"""Stage 1: contexts in, images out, for several requests at once, whatever their sizes, settings and progress."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from bagel_jax.buckets import padded_grid
from bagel_jax.config import BagelConfig
from bagel_jax.engine.context.stage import IN_FLIGHT, CallFailed
from bagel_jax.engine.denoise import decoder, steps
from bagel_jax.engine.denoise.batch import denoise_batch, denoise_rows, forecasts_of, padded_tokens
from bagel_jax.engine.denoise.jobs import DenoiseJob
from bagel_jax.engine.handoff import check_context
from bagel_jax.engine.kv.store import VIEWS, KVStore, all_blocks, block_pages
from bagel_jax.engine.ticket import Done, Event, Progress, Ticket
from bagel_jax.errors import InputError
from bagel_jax.inputs.images import to_image
from bagel_jax.inputs.tokenizer import Tokenizer
from bagel_jax.models.weights import Weights
from bagel_jax.request import Result
from bagel_jax.settings import EngineConfig, attention_backend


@dataclass
class Call:
    """Evaluations that were dispatched, or images that are decoded."""

    jobs: list[DenoiseJob]
    ready: jax.Array  # there when the call is done
    done: list[int] = field(default_factory=list)  # evaluations of each job by then
    drawing: Drawing | None = None
    size: tuple[int, int, bool] = (0, 0, True)  # see `DenoiseStage.size`
    evaluations: int = 0
    since: float = 0.0  # when it was dispatched


@dataclass
class Drawing:
    """Images of one padded grid on their way."""

    latents: jax.Array  # [B, M, C p²]
    pixels: jax.Array | None  # [B, H, W, 3], padded; None: in tiles, once the latents are there


class DenoiseStage:
    """Denoises the images of several requests together.

    No thread, no clock: `accept` takes a request in, `run` dispatches, `collect` reads, `now` is only noted.

    Args:
        weights: the model, on the store's placement.
        config: its sizes.
        tokenizer: for the marker tokens.
        settings: see `EngineConfig`.
        store: keys and values.
    """

    def __init__(
        self, weights: Weights, config: BagelConfig, tokenizer: Tokenizer, settings: EngineConfig, store: KVStore
    ):
        self.weights, self.config, self.settings, self.store = weights, config, settings, store
        self.backend = attention_backend(settings.attention, store.placement.platform)
        self.markers = np.asarray(tokenizer.special.markers, np.int32)
        self.slots: list[DenoiseJob | None] = [None] * settings.dit_max_num_seqs
        self.spread = store.placement.spread
        self._largest = padded_tokens(config.max_latent_size**2, config, self.spread)
        self.calls: deque[Call] = deque()
        self.reset()

    @property
    def jobs(self) -> list[DenoiseJob]:
        """Requests in work."""
        return [job for job in self.slots if job is not None]

    @property
    def busy(self) -> bool:
        """Whether there is anything that is not finished."""
        return bool(self.calls or self.jobs)

    @property
    def size(self) -> tuple[int, int, bool]:
        """What the time of the next evaluation depends on: rows, tokens, whether some are forecast."""
        jobs = self.jobs
        rows = len(denoise_rows(jobs, len(self.slots)).slot)
        return rows, self._padded_tokens(jobs) if jobs else 0, all(job.taylor is None for job in jobs)

    @property
    def lost(self) -> bool:
        """Whether a program that failed had been given arrays that all later ones need."""
        return self.latents.is_deleted() or self.store.pages.is_deleted()

    def check(self, ticket: Ticket, pages: int) -> None:
        """That a request with a context of so many pages could be taken in.

        Raises:
            InputError: it could not, or the context that was given is not its own.
        """
        if ticket.given is not None:
            check_context(ticket.given, ticket.request_id, ticket.prepared.image_size, self.store)
            pages = ticket.given.num_pages
        blocks, there = self.blocks_needed(ticket), self.store.pool.num_pages
        if pages + blocks > there:
            raise InputError(
                f"the request needs {pages + blocks} pages of {self.settings.page_size} tokens in stage 1, {blocks} of "
                f"them for its image, and there are {there}; ask for a smaller image, give a shorter prompt, or raise "
                "dit_max_num_seqs or num_pages"
            )

    def blocks_needed(self, ticket: Ticket) -> int:
        """Pages that a request's image is denoised in, at most."""
        return all_blocks(len(ticket.prepared.initial_latent), self.settings.page_size)

    def accept(self, ticket: Ticket, now: float) -> bool:
        """Takes over a request's context and gives it a slot, where there is room; says whether it did.

        Raises:
            Exception: the context cannot be taken over; then everything is as before.
        """
        blocks = self.store.blocks.take(self.blocks_needed(ticket)) if None in self.slots else None
        if blocks is None:
            return False
        with contextlib.ExitStack() as undo:
            undo.callback(self.store.blocks.give_back, blocks)
            if not self._reserve(ticket):
                return False
            job = DenoiseJob.create(ticket, ticket.lease)
            job.slot = self.slots.index(None)
            job.blocks = blocks[: len(job.view_pages) * block_pages(job.tokens, self.settings.page_size)]
            self._lay_blocks(job)
            noise = np.zeros(self.latents.shape[1:], np.float32)
            noise[: job.tokens] = ticket.prepared.initial_latent
            self.latents = steps.join(self.latents, np.int32(job.slot), noise, spread=self.spread)
            undo.pop_all()
        self.store.blocks.give_back(blocks[len(job.blocks) :])  # of views that see the same as others
        self.store.blocks.forgo(ticket)
        self.slots[job.slot], ticket.denoise = job, job
        ticket.enter("denoise", now)
        return True

    def drop(self, ticket: Ticket) -> None:
        """Forgets a request and lets go of its context."""
        job, ticket.denoise = ticket.denoise, None
        if job is not None and self.slots[job.slot] is job:
            self._let_go(job)

    def run(self, evaluations: int | None, now: float) -> bool:
        """Takes all requests as many evaluations further as need the same rows, at most so many; says whether it did.

        Images of those that are done then are decoded right behind.

        Raises:
            CallFailed: the device failed.
        """
        jobs = self.jobs
        if not jobs or sum(call.drawing is None for call in self.calls) >= IN_FLIGHT:
            return False
        try:
            self._denoise(jobs, evaluations, now)
            self._draw([job for job in jobs if job.done == job.total])
        except Exception as error:  # a device fails in any way it likes
            raise CallFailed([job.ticket for job in jobs], error) from error
        return True

    def collect(self, now: float) -> list[Event]:
        """What has come of the oldest call.

        Raises:
            CallFailed: the device failed.
        """
        call = self.calls.popleft()
        jobs = [job for job in call.jobs if not job.ticket.over]
        try:
            if call.drawing is not None:
                drawn = self._drawn(call)
                return [Done(job.ticket.request_id, outcome) for job, outcome in drawn if not job.ticket.over]
            call.ready.block_until_ready()
        except Exception as error:
            raise CallFailed([job.ticket for job in jobs], error) from error
        done = {id(job): count for job, count in zip(call.jobs, call.done, strict=True)}
        for job in jobs:
            if done[id(job)] == job.total:
                job.ticket.enter("pixels", now)
        return [Progress(done[id(job)], job.total, job.ticket.request_id) for job in jobs]

    def reset(self) -> None:
        """Drops everything that is in work and in flight, after a failure, and gives back what it holds."""
        for job in self.jobs:
            self.drop(job.ticket)
        self.forget()

    def forget(self) -> None:
        """Begins anew, whatever the books say."""
        self.slots = [None] * len(self.slots)
        self.calls.clear()
        shape = len(self.slots), self._largest, self.config.latent_dim
        self.latents = self.store.placement.put(jnp.zeros(shape))
        self._terms: jax.Array | None = None

    def _reserve(self, ticket: Ticket) -> bool:
        """Takes hold of a request's context on this stage's store; False: there is no room for it."""
        if ticket.given is not None:
            ticket.lease = ticket.given.lease(self.store)
        else:
            ticket.lease = ticket.lease.moved(self.store) or ticket.lease
        return ticket.lease is not None and ticket.lease.store is self.store

    def _padded_tokens(self, jobs: Sequence[DenoiseJob]) -> int:
        return padded_tokens(max(job.tokens for job in jobs), self.config, self.spread)

    def _lay_blocks(self, job: DenoiseJob) -> None:
        """Gives each view pages for its block, which begins in a copy of the page with which its context ends."""
        size, copies = self.settings.page_size, []
        count = block_pages(job.tokens, size)
        width = max(map(len, job.view_pages)) + count
        job.page_table = np.zeros((len(job.view_pages), width), np.int32)
        for view, (pages, length) in enumerate(zip(job.view_pages, job.length, strict=True)):
            block = job.blocks[view * count : (view + 1) * count]
            whole, rest = divmod(int(length), size)
            job.page_table[view, :whole] = pages[:whole]
            job.page_table[view, whole : whole + count] = block[: width - whole]
            if rest:
                copies.append((pages[whole], block[0]))
        self.store.copy(copies)

    def _denoise(self, jobs: list[DenoiseJob], evaluations: int | None, now: float) -> None:
        slots, count = len(self.slots), self._padded_tokens(jobs)
        rows, ahead = denoise_rows(jobs, slots), forecasts_of(jobs, slots)
        number = min(job.steps_alike() for job in jobs)
        if evaluations is not None:
            number = min(number, max(1, evaluations))
        batch = denoise_batch(jobs, slots, count, self.config, self.markers)
        static = steps.DenoiseProgram(self.weights.skeleton, self.backend, count, self.spread)
        state = steps.DenoiseState(self.latents, self.store.pages, self._room_for_terms(jobs, count))
        state, ready = steps.denoise(static, self.weights.arrays, state, batch, rows, ahead, np.int32(number))
        self.latents, self.store.pages, self._terms = state
        for job in jobs:
            job.take(number)
        size = len(rows.slot), count, ahead is None
        self.calls.append(Call(jobs, ready, [job.done for job in jobs], size=size, evaluations=number, since=now))

    def _draw(self, jobs: Sequence[DenoiseJob]) -> None:
        """Starts decoding finished requests' latents, those of one padded grid together.

        Their slots and contexts are free from now on: what is dispatched later comes later on the device too.
        """
        limit = self.config.max_latent_size
        groups: dict[tuple[int, int], list[DenoiseJob]] = {}
        for job in jobs:
            groups.setdefault(padded_grid(*job.ticket.prepared.latent_grid, limit), []).append(job)
        for padded, alike in groups.items():
            for group in decoder.groups(alike):
                slots = np.asarray([job.slot for job in group], np.int32)
                grids = [job.ticket.prepared.latent_grid for job in group]
                latents, pixels = steps.leave(self.latents, slots, spread=self.spread), None
                if not (self.settings.vae_tiling and max(map(max, grids)) > decoder.TILE):
                    pixels = decoder.start(self.weights, latents, grids, padded, self.spread)
                self.calls.append(
                    Call(list(group), latents if pixels is None else pixels, drawing=Drawing(latents, pixels))
                )
        for job in jobs:
            self._let_go(job)

    def _let_go(self, job: DenoiseJob) -> None:
        """Gives back a request's slot and all its pages."""
        self.slots[job.slot] = None
        self.store.blocks.give_back(job.blocks)
        job.lease.release()
        job.ticket.lease = None

    def _drawn(self, call: Call) -> list[tuple[DenoiseJob, Result | Exception]]:
        """The images that were decoded together; where that failed, each is decoded alone."""
        grids = [job.ticket.prepared.latent_grid for job in call.jobs]
        latents = np.asarray(call.drawing.latents)
        images: list[np.ndarray | None] = [None] * len(grids)
        if call.drawing.pixels is not None:
            # One after another where it fails, so that whoever it was, the others have an image.
            with contextlib.suppress(Exception):
                images = decoder.cropped(np.asarray(call.drawing.pixels, np.float32), grids, self.config.token_pixels)
        outcomes = []
        for i, (job, pixels) in enumerate(zip(call.jobs, images, strict=True)):
            try:
                if pixels is None:
                    one = latents[i, : job.tokens]
                    tiled = self.settings.vae_tiling
                    (pixels,) = decoder.decode(
                        self.weights, [one], [grids[i]], self.config.max_latent_size, tiled=tiled, spread=self.spread
                    )
                outcome = self._result(job.ticket, latents[i, : job.tokens].copy(), pixels)
            except Exception as error:
                outcome = error
            outcomes.append((job, outcome))
        return outcomes

    def _result(self, ticket: Ticket, latents: np.ndarray, pixels: np.ndarray) -> Result:
        for part, numbers in (("latents", latents), ("pixels", pixels)):
            if not np.isfinite(numbers).all():
                raise FloatingPointError(f"the {part} are not finite; the weights or the settings are unusable")
        ticket.result.latents, ticket.result.image = latents, to_image(pixels)
        return ticket.result

    def _room_for_terms(self, jobs: Sequence[DenoiseJob], count: int) -> jax.Array | None:
        """Room for the expansions of all requests that forecast; None where none does."""
        orders = [job.ticket.prepared.request.settings.taylorseer_order for job in jobs if job.taylor is not None]
        old = self._terms
        if not orders:
            return None
        there = (0, 0) if old is None else (old.shape[2], old.shape[3])
        wanted = max(there[0], 1 + max(orders)), max(there[1], count)
        if wanted == there:
            return old
        shape = len(self.slots), VIEWS, *wanted, self.config.trunk.hidden_size
        terms = self.store.placement.put(jnp.zeros(shape, self.store.dtype), *steps.TERMS)
        return terms if old is None else terms.at[:, :, : there[0], : there[1]].set(old)
