"""Stage 0: from plans to contexts, and text from contexts, for many requests at once."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from bagel_jax.buckets import bucket, padded_grid, power_of_two
from bagel_jax.config import BagelConfig
from bagel_jax.engine.context import steps
from bagel_jax.engine.context.batch import decode_batch, page_table, prefill_batch
from bagel_jax.engine.context.jobs import ContextJob
from bagel_jax.engine.context.scheduler import ImageChunk, Scheduler, StepPlan
from bagel_jax.engine.handoff import Lease, Views
from bagel_jax.engine.kv.store import KVStore
from bagel_jax.engine.ticket import Done, Event, TextDelta, Ticket
from bagel_jax.errors import InputError
from bagel_jax.inputs.prepare import latent_positions, vit_positions
from bagel_jax.inputs.tokenizer import Tokenizer
from bagel_jax.layout import Text, VaeImage
from bagel_jax.models.weights import Weights
from bagel_jax.pallas.paged_attention.api import BACKENDS
from bagel_jax.settings import EngineConfig, attention_backend

# Tokens of one context at most; the width of page tables, which every step carries, follows from it.
MAX_CONTEXT = 32768
IN_FLIGHT = 2  # calls: the next one is dispatched before the tokens of the last are read
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # decoded from the first bytes of a letter


@dataclass
class Call:
    """A step that was dispatched."""

    plan: StepPlan
    ready: jax.Array  # the tokens chosen, `[R, tokens]`; where no row decodes, just what is there when the step is done
    rows: steps.DecodeBatch | None = None  # as they stand then, where the next call may go on with them
    sampling: Any = None
    evaluations = 0  # of stage 1


class ContextStage:
    """Builds contexts and decodes text for many requests, call by call.

    No thread, no clock: `run` dispatches, `collect` reads, `now` is only noted.

    Args:
        weights: the model, on the store's placement.
        config: its sizes.
        tokenizer: for the marker tokens and the texts of plans.
        settings: see `EngineConfig`.
        store: keys and values.

    Raises:
        InputError: `pallas` was asked for and takes no such model.
    """

    def __init__(
        self, weights: Weights, config: BagelConfig, tokenizer: Tokenizer, settings: EngineConfig, store: KVStore
    ):
        self.weights, self.config, self.store = weights, config, store
        self.tokenizer, self.settings = tokenizer, settings
        platform = store.placement.platform
        self.program = steps.ContextProgram(
            weights.skeleton, attention_backend(settings.attention, platform), spread=store.placement.spread
        )
        self.table_width = min(store.pool.num_pages, -(-MAX_CONTEXT // settings.page_size))
        self.scheduler = Scheduler(store, settings, tokenizer.special.markers)
        if settings.attention == "pallas":
            c = config.trunk
            q = jax.ShapeDtypeStruct((1, c.num_heads, c.head_dim), store.dtype)
            if not BACKENDS[self.program.backend].supports(q, store.pages):
                raise InputError(
                    f"attention is 'pallas', whose {platform} kernel takes no heads of width {c.head_dim} in "
                    f"{np.dtype(store.dtype)} over pages of {settings.page_size}; give auto, which leaves them to XLA"
                )
        self.end_token = tokenizer.im_end
        self._nothing = store.placement.put(np.zeros(1, np.int32))
        self.calls: deque[Call] = deque()
        self.finished: deque[Ticket] = deque()  # with leases of their contexts, which the engine takes from here

    @property
    def busy(self) -> bool:
        """Whether there is anything that is not finished."""
        return bool(self.calls or self.scheduler.running or self.scheduler.waiting)

    def submit(self, ticket: Ticket) -> None:
        """Takes a request in.

        Raises:
            InputError: it could never fit into the pages there are.
        """
        ticket.context = job = ContextJob.create(ticket, self.tokenizer.im_start)
        reason = self._too_long(job)
        if reason is not None:
            raise InputError(reason)
        self.scheduler.waiting.append(job)

    def pages_needed(self, ticket: Ticket) -> int:
        """Pages that the contexts of a request may need, its text included."""
        return self.scheduler.pages_needed(ticket.context)

    def forget(self) -> None:
        """Begins anew, whatever the books say."""
        self.calls.clear()
        self.finished.clear()
        self.scheduler.running.clear()
        self.scheduler.waiting.clear()

    def drop(self, ticket: Ticket) -> None:
        """Forgets a request and frees its pages."""
        self.scheduler.release(ticket.context)

    def run(self, now: float) -> bool:
        """Dispatches the next call, if that does not depend on what is in flight; says whether it did.

        Raises:
            CallFailed: the device failed.
        """
        last = self.calls[-1] if self.calls else None
        if len(self.calls) >= IN_FLIGHT or (last is not None and last.plan.rows and last.rows is None):
            return False
        if last is not None and last.rows is not None:
            plan = self.scheduler.follow(last.plan, steps.MAX_CALL)
        else:  # what is only prefilled chooses nothing, so all is known of it
            plan = self.scheduler.plan(steps.MAX_CALL, now)
        if plan is None or not (plan.jobs or plan.copies or self._found_whole()):
            return False
        try:
            if last is not None and last.rows is not None:
                self._decode(plan, last.rows, last.sampling)
            else:
                self._dispatch(plan)
        except Exception as error:  # a device fails in any way it likes, and what prepares a call too
            raise CallFailed([job.ticket for job in plan.jobs or self.scheduler.running], error) from error
        return True

    def collect(self, now: float) -> list[Event]:
        """What has come of the oldest call.

        Raises:
            CallFailed: the device failed.
        """
        call = self.calls.popleft()
        try:
            chosen = np.asarray(call.ready)
        except Exception as error:  # a device fails in any way it likes
            raise CallFailed([job.ticket for job in call.plan.jobs], error) from error
        for job in dict.fromkeys(chunk.job for chunk in call.plan.texts):
            if not job.ticket.over and job.prefilled:
                job.ticket.enter("decode" if job.decoding else "wait", now)
        events: list[Event] = []
        if call.plan.rows:
            for job, tokens in zip(call.plan.rows, chosen[: len(call.plan.rows), : call.plan.tokens], strict=True):
                if job.decoding is not None and not job.ticket.over:
                    events += self._guarded(job, partial(self._decoded, job, tokens.tolist(), now))
        for job in [job for job in self.scheduler.running if job.finished]:
            events += self._guarded(job, partial(self._finish, job, now))
        return events

    def _found_whole(self) -> bool:
        """Whether there are contexts of which nothing was to be computed, since prefixes of them were kept."""
        return not self.calls and any(job.finished for job in self.scheduler.running)

    def _guarded(self, job: ContextJob, function) -> list[Event]:
        """The events that a request's part of a call gives; whatever is wrong with it fails that request alone."""
        try:
            return function()
        except Exception as error:
            self.drop(job.ticket)
            return [Done(job.ticket.request_id, error)]

    def _finish(self, job: ContextJob, now: float) -> list[Event]:
        """A request leaves the stage, with its text or with a lease of its context."""
        ticket, request = job.ticket, job.ticket.prepared.request
        if not request.makes_image:
            self.drop(ticket)
            return [Done(ticket.request_id, ticket.result)]
        views, prefixes = Views.of(request.request_id, ticket.prepared.image_size, job.prefixes)
        held = [job.sequences[p.sequence].pages[: self.store.count(p.length)] for p in prefixes]
        ticket.lease = Lease.hold(self.store, views, held)
        self.drop(ticket)
        ticket.enter("wait", now)
        self.finished.append(ticket)
        return []

    def _too_long(self, job: ContextJob) -> str | None:
        size = self.settings.page_size
        longest = max(s.length for s in job.sequences) + (job.decoding.limit if job.decoding is not None else 0)
        if longest > MAX_CONTEXT:
            return f"the request may need {longest} tokens of context; at most {MAX_CONTEXT} are possible"
        pages, there = self.scheduler.pages_needed(job) + job.ticket.blocks, self.store.pool.num_pages
        if pages > there:
            less = "ask for a smaller image" if job.ticket.blocks else "lower its limit of tokens"
            return (
                f"the request may need {pages} pages of {size} tokens and the KV cache has {there}; raise num_pages to "
                f"{pages + 1} or {less}"
            )
        return None

    def _dispatch(self, plan: StepPlan) -> None:
        static, arrays, store = self.program, self.weights.arrays, self.store
        store.copy(plan.copies)
        if not plan.jobs:
            self.calls.append(Call(plan, self._nothing))
            return
        if not plan.texts:
            rows, sampling = decode_batch(plan.rows, power_of_two(len(plan.rows)))
            # As the rows that a call returns, or the program would be compiled for each of the two.
            self._decode(plan, store.placement.put(rows), sampling)
            return
        image = None if plan.image is None else self._embed(plan.image)
        static = static._replace(latents=plan.image is not None and isinstance(plan.image.segment, VaeImage))
        chunk = prefill_batch(plan, image, store.page_size, self.table_width)
        if plan.rows:
            rows, sampling = decode_batch(plan.rows, self.settings.ar_max_num_seqs)
            table = page_table(plan.rows, len(rows.token), self.table_width)
            ready, store.pages = steps.mixed(static, arrays, store.pages, rows, table, chunk, sampling)
        else:
            ready, store.pages = steps.prefill(static, arrays, store.pages, chunk)
        self.calls.append(Call(plan, ready))
        for text in plan.texts:
            count = plan.count(text)
            text.job.ticket.result.prefilled_tokens += count
            self.scheduler.computed(text.sequence, text.sequence.computed + count)

    def _decode(self, plan: StepPlan, rows: steps.DecodeBatch, sampling) -> None:
        table = page_table(plan.rows, len(rows.token), self.table_width)
        ends = np.int32(self.end_token), np.int32(plan.tokens)
        chosen, rows, self.store.pages = steps.decode(
            self.program, self.weights.arrays, self.store.pages, rows, table, sampling, *ends
        )
        self.calls.append(Call(plan, chosen, rows, sampling))

    def _embed(self, chunk: ImageChunk) -> jax.Array:
        """An image's block between its markers, `[N, D]`, padded."""
        prepared, segment = chunk.job.ticket.prepared, chunk.segment
        image = prepared.images[segment.image]
        model, spread = (self.weights.skeleton, self.weights.arrays), self.program.spread
        padding = bucket(segment.num_inside, 64) - segment.num_inside
        if isinstance(segment, VaeImage):
            tokens, index = self._encode(image.vae_pixels, prepared.posterior_noise[segment.image])
            positions = np.pad(latent_positions((segment.rows, segment.columns), self.config), (0, padding))
            index = np.pad(index, (0, padding), constant_values=-1)
            return steps.embed_vae(*model, tokens, index, positions, spread)
        patches = np.pad(image.vit_patches, ((0, padding), (0, 0)))
        positions = np.pad(vit_positions(image, self.config), (0, padding))
        return steps.embed_vit(*model, patches, positions, np.int32(segment.num_inside), spread)

    def _encode(self, pixels: np.ndarray, noise: np.ndarray) -> tuple[jax.Array, np.ndarray]:
        """Latent tokens of an image's padded grid, and which of them are the image's, `[N]` int32."""
        c, size = self.config, np.asarray(pixels.shape[:2], np.int32)
        # Up: what fills no token any more is seen by the autoencoder nevertheless.
        rows, columns = padded_grid(*(int(side) for side in -(-size // c.token_pixels)), c.max_latent_size)
        pixels, noise = (
            np.pad(x, ((0, rows * unit - x.shape[0]), (0, columns * unit - x.shape[1]), (0, 0)))
            for x, unit in ((pixels, c.token_pixels), (noise, c.latent_patch_size))
        )
        tokens = steps.encode_image(
            self.weights.skeleton, self.weights.arrays, pixels, noise, size, c.max_latent_size**2, self.program.spread
        )
        real_rows, real_columns = size // c.token_pixels
        index = np.arange(real_rows, dtype=np.int32)[:, None] * columns + np.arange(real_columns, dtype=np.int32)
        return tokens, index.reshape(-1)

    def _decoded(self, job: ContextJob, tokens: list[int], now: float) -> list[Event]:
        """Takes in the tokens that a row chose one after another; what comes behind the end of a text is none."""
        sequence, ticket = job.sequences[0], job.ticket
        if ticket.result.time_to_first_token is None:
            ticket.result.time_to_first_token = now - ticket.submitted
        new: list[int] = []
        for token in tokens:
            sequence.computed += 1
            ticket.result.decoded_tokens += 1
            if token == self.end_token or len(sequence.tail) >= job.decoding.limit:
                self._end_text(job, now)
                return [*self._text(ticket, new), *self._rest(ticket)]
            sequence.tail.append(token)
            new.append(token)
        return self._text(ticket, new)

    def _text(self, ticket: Ticket, ids: list[int]) -> list[Event]:
        """The text that tokens add; the first bytes of a letter wait for its last."""
        if not ids:
            return []
        ticket.untold += ids
        text = self.tokenizer.piece(ticket.untold)
        if text.endswith(_UNFINISHED):
            text = ""
        else:
            ticket.untold.clear()
        ticket.said += text
        return [TextDelta(text, len(ids), ticket.request_id)]

    def _rest(self, ticket: Ticket) -> list[Event]:
        """What an answer ends with that was no whole letter."""
        text = ticket.result.text
        if not text.startswith(ticket.said) or text == ticket.said:
            return []
        return [TextDelta(text[len(ticket.said) :], 0, ticket.request_id)]

    def _end_text(self, job: ContextJob, now: float) -> None:
        """A text is over; before an image it becomes part of the context, tokenized anew as officially."""
        sequence, ticket = job.sequences[0], job.ticket
        job.decoding, job.ids = None, list(sequence.tail)
        ticket.result.text = self.tokenizer.answer(job.ids)
        if not ticket.prepared.request.makes_image:
            ticket.enter("", now)
            return
        ticket.enter("prefill", now)
        sequence.append(Text(self.tokenizer.prompt(ticket.result.text)))
        reason = self._too_long(job)
        if reason is not None:
            raise InputError(reason)
        if not self.scheduler.grow(sequence, sequence.length):
            self.scheduler.preempt(job, now)


class CallFailed(Exception):
    """A call failed, whose work it was."""

    def __init__(self, tickets: list[Ticket], error: Exception):
        super().__init__(str(error))
        self.tickets, self.error = tickets, error
