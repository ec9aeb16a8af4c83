"""Stage 0: from plans to contexts, and text from contexts, for many requests at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from bagel_jax.buckets import bucket, power_of_two
from bagel_jax.engine.context import steps
from bagel_jax.engine.context.batch import chunk_of, copies_of, rows_of
from bagel_jax.engine.context.jobs import Decoding, Job, Statistics
from bagel_jax.engine.context.scheduler import Image, Scheduler, StepPlan
from bagel_jax.engine.handoff import ContextKV, Failed, branches, tables
from bagel_jax.engine.kv.pool import PagePool, choose_num_pages
from bagel_jax.errors import InputError
from bagel_jax.inputs.prepare import Prepared, latent_positions, vit_positions
from bagel_jax.inputs.tokenizer import Tokenizer
from bagel_jax.layout import KVPrefix, PlacedSegment, Text, VaeImage
from bagel_jax.models.weights import Weights
from bagel_jax.pallas.paged_attention.api import BACKENDS
from bagel_jax.pallas.paged_attention.pages import empty_pages
from bagel_jax.settings import ServingSettings, attention_backend

# Tokens of one context at most; the width of page tables, which every step carries, follows from it.
MAX_CONTEXT = 32768
_TOKENS_A_CALL = steps.MAX_CALL


@dataclass(frozen=True)
class Tokens:
    """Tokens that a request has decoded since it was last heard of."""

    request_id: str
    ids: list[int]


@dataclass(frozen=True)
class Finished:
    """All contexts of a request are there and all its tokens decoded.

    One that makes an image keeps its pages until its context is taken (`ContextStage.take`); any other has left.
    """

    request_id: str
    ids: list[int] | None  # decoded, `<|im_start|>` first and the end token not among them; None: nothing was
    stats: Statistics


Event = Tokens | Finished | Failed


class ContextStage:
    """Builds contexts and decodes text for many requests, step by step.

    Args:
        weights: the model.
        config: its sizes.
        dtype: of keys and values.
        tokenizer: for the marker tokens and the texts of thoughts.
        settings: see `ServingSettings`.

    Raises:
        InputError: the device has no memory for the KV cache, or `pallas` was asked for and takes no such model.
    """

    def __init__(self, weights: Weights, config, dtype, tokenizer: Tokenizer, settings: ServingSettings | None = None):
        self.weights, self.config, self.dtype, self.tokenizer = weights, config, dtype, tokenizer
        self.settings = settings = settings or ServingSettings()
        device = weights.device
        self.program = steps.Program(weights.skeleton, attention_backend(settings.attention, device.platform))
        count = choose_num_pages(config, settings, dtype, device)
        self.table_width = min(count - 1, -(-MAX_CONTEXT // settings.page_size))
        self.scheduler = Scheduler(PagePool(count), settings, (tokenizer.vision_start, tokenizer.vision_end))
        self.pages = self._empty_pages()
        if settings.attention == "pallas":
            c = config.trunk
            q = jax.ShapeDtypeStruct((1, c.num_heads, c.head_dim), dtype)
            if not BACKENDS[self.program.backend].supports(q, self.pages):
                raise InputError(
                    f"attention is 'pallas', whose {device.platform} kernel takes no heads of width {c.head_dim} in "
                    f"{np.dtype(dtype)} over pages of {settings.page_size}; give auto, which leaves them to XLA"
                )
        self.end_token = tokenizer.im_end
        self.stalled = False  # whether the last step had nothing to do but wait for pages
        self._ready: dict[str, Job] = {}  # finished, with contexts that nobody has taken yet
        self._copy([(0, 0)])  # compiled now: the first request may not need it, and the next one should compile nothing

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def submit(self, prepared: Prepared) -> None:
        """Takes a request in; `step` works on it.

        Raises:
            InputError: it could never fit into the pages there are, or its id is taken.
        """
        request = prepared.request
        if any(job.request_id == request.request_id for job in self._jobs()):
            raise InputError(f"request_id {request.request_id!r} is already in work; each request needs its own")
        job = Job.create(prepared, self._decoding(request), self.tokenizer.im_start)
        reason = self._too_long(job)
        if reason is not None:
            raise InputError(reason)
        self.scheduler.waiting.append(job)

    def pages_needed(self, request_id: str) -> int:
        """Pages that the contexts of a request in work may need, its text included."""
        return next(self.scheduler.pages_needed(job) for job in self._jobs() if job.request_id == request_id)

    def cancel(self, request_id: str) -> bool:
        """Drops a request and frees its pages; False if it is not there (any more)."""
        for job in self._jobs():
            if job.request_id == request_id:
                self._release(job)
                return True
        return False

    def take(self, request_id: str) -> ContextKV:
        """The context of a request that has finished; its pages here are free from now on."""
        job = self._ready[request_id]
        plan, prepared = job.prepared.plan, job.prepared
        views, text_view, img_view = branches(job.main, plan.drop_text, plan.drop_image)
        size = self.settings.page_size
        own, table = tables([job.sequences[view.sequence].pages[: -(-view.length // size)] for view in views])
        numbers = np.zeros(bucket(max(1, len(own)), 1), np.int32)
        numbers[: len(own)] = own
        pages = steps.take_pages(self.pages, numbers)
        self._release(job)
        length, rope = (np.asarray([getattr(v, name) for v in views], np.int32) for name in ("length", "rope"))
        return ContextKV(pages, table, length, rope, request_id, prepared.image_size, text_view, img_view)

    def pages_ready(self, request_id: str) -> int | None:
        """Pages that a finished request's context has; None if it is not there (yet)."""
        job = self._ready.get(request_id)
        return None if job is None else len({page for sequence in job.sequences for page in sequence.pages})

    def step(self) -> list[Event]:
        """Computes one step; returns what has come of it.

        Where the device fails with several requests in the step, all begin again, those one by one, so that only whose
        fault it is fails.
        """
        plan = self.scheduler.plan(_TOKENS_A_CALL)
        self.stalled = not (plan.rows or plan.pieces)
        try:
            events = self._compute(plan)
        except Exception as error:  # a device fails in any way it likes
            return self._begin_again(plan, error)
        for job in [job for job in self.scheduler.running if job.finished]:
            if job.prepared.request.makes_image:
                self.scheduler.running.remove(job)
                self._ready[job.request_id] = job
            else:
                self._release(job)
            events.append(Finished(job.request_id, job.ids, job.stats))
        return events

    def _compute(self, plan: StepPlan) -> list[Event]:
        self._copy(plan.copies)
        chosen = self._dispatch(plan)
        for piece in plan.pieces:
            count = plan.count(piece)
            piece.job.stats.prefilled_tokens += count
            self.scheduler.computed(piece.sequence, piece.sequence.computed + count)
        prefilled = [job for job in dict.fromkeys(piece.job for piece in plan.pieces) if job.prefilled]
        if prefilled:
            jax.block_until_ready(self.pages)  # a context is there when it is computed, not when it is asked for
        for job in prefilled:
            job.end_phase("prefill")
        events: list[Event] = []
        if chosen is not None:
            for job, tokens in zip(plan.rows, np.asarray(chosen)[: len(plan.rows), : plan.tokens], strict=True):
                events += self._decoded(job, tokens.tolist())
        return events

    def _begin_again(self, plan: StepPlan, error: Exception) -> list[Event]:
        """After a failure, in which the pages were lost: everybody's contexts are computed anew."""
        self.pages = self._empty_pages()
        involved = list(dict.fromkeys([*plan.rows, *(piece.job for piece in plan.pieces)]))
        self.scheduler.start_over(self._ready.values())
        self._ready.clear()
        if len(involved) > 1:
            for job in involved:
                job.suspect = True
            return []
        for job in involved:
            self._release(job)
        return [Failed(job.request_id, error) for job in involved]

    def _empty_pages(self) -> jax.Array:
        c = self.config.trunk
        shape = c.num_layers, self.scheduler.pool.num_pages + 1, c.num_kv_heads, self.settings.page_size, c.head_dim
        return self.weights.place(empty_pages(*shape, self.dtype))

    def _jobs(self) -> list[Job]:
        return [*self.scheduler.running, *self.scheduler.waiting, *self._ready.values()]

    def _release(self, job: Job) -> None:
        self._ready.pop(job.request_id, None)
        self.scheduler.release(job)

    def _decoding(self, request) -> Decoding | None:
        if request.makes_image and not request.think:
            return None
        s = request.settings
        return Decoding(
            limit=s.max_think_tokens if request.makes_image else s.max_tokens,
            key=(0, request.seed),  # as `jax.random.key` makes it of 32 bits, without asking the device
            do_sample=s.do_sample,
            temperature=s.text_temperature,
            top_k=s.top_k,
            top_p=s.top_p,
        )

    def _too_long(self, job: Job) -> str | None:
        size = self.settings.page_size
        longest = max(s.length for s in job.sequences) + (job.decoding.limit if job.decoding is not None else 0)
        if longest > MAX_CONTEXT:
            return f"the request may need {longest} tokens of context; at most {MAX_CONTEXT} are possible"
        pages, there = self.scheduler.pages_needed(job), self.scheduler.pool.num_pages
        if pages > there:
            return (
                f"the request may need {pages} pages of {size} tokens and the KV cache has {there}; raise num_pages to "
                f"{pages + 1} or lower its limit of tokens"
            )
        return None

    def _dispatch(self, plan: StepPlan):
        """Starts the step's program; returns the tokens chosen, `[R, tokens]`, or None where no row decodes."""
        static, arrays, settings = self.program, self.weights.arrays, self.settings
        rows = chunk = None
        if plan.pieces:
            image = None if plan.image is None else self._embed(plan.image)
            static = static._replace(latents=plan.image is not None and isinstance(plan.image.segment, VaeImage))
            chunk = chunk_of(plan, image, settings.page_size, self.table_width)
        if plan.rows:
            size = settings.ar_max_num_seqs if plan.pieces else power_of_two(len(plan.rows))
            rows, sampling = rows_of(plan.rows, size, self.table_width)
        if rows is None and chunk is None:
            return None
        if rows is None:
            self.pages = steps.prefill(static, arrays, self.pages, chunk)
            return None
        if chunk is None:
            ends = np.int32(self.end_token), np.int32(plan.tokens)
            chosen, self.pages = steps.decode(static, arrays, self.pages, rows, sampling, *ends)
        else:
            chosen, self.pages = steps.mixed(static, arrays, self.pages, rows, chunk, sampling)
        return chosen

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        for source, target in copies_of(copies):
            self.pages = steps.copy_pages(self.pages, source, target)

    def _embed(self, image: Image) -> jax.Array:
        """An image's block between its markers, `[N, D]`, padded."""
        prepared, segment = image.job.prepared, image.segment
        image = prepared.images[segment.image]
        model = self.weights.skeleton, self.weights.arrays
        count = segment.num_tokens - 2
        if isinstance(segment, VaeImage):
            noise = prepared.posterior_noise[segment.image]
            positions = latent_positions((segment.rows, segment.columns), self.config)
            return steps.embed_vae(*model, image.vae_pixels, noise, positions, bucket(count, 64))
        padding = bucket(count, 64) - count
        patches = np.pad(image.vit_patches, ((0, padding), (0, 0)))
        positions = np.pad(vit_positions(image, self.config), (0, padding))
        return steps.embed_vit(*model, patches, positions, np.int32(count))

    def _decoded(self, job: Job, tokens: list[int]) -> list[Event]:
        """Takes in the tokens that a row chose one after another; what comes behind the end of a text is none."""
        sequence, stats = job.sequences[0], job.stats
        if stats.time_to_first_token is None:
            stats.time_to_first_token = time.perf_counter() - stats.submitted
        new: list[int] = []
        for token in tokens:
            sequence.computed += 1
            stats.decoded_tokens += 1
            if token == self.end_token or len(sequence.tail) >= job.decoding.limit:
                return [*([Tokens(job.request_id, new)] if new else []), *self._end_text(job)]
            sequence.tail.append(token)
            new.append(token)
        return [Tokens(job.request_id, new)]

    def _end_text(self, job: Job) -> list[Event]:
        """A text is over; before an image it becomes part of the context, tokenized anew as officially."""
        job.decoding, sequence = None, job.sequences[0]
        job.ids = list(sequence.tail)
        job.end_phase("decode")
        if not job.prepared.request.makes_image:
            return []
        thought = Text(self.tokenizer.prompt(self.tokenizer.answer(job.ids)))
        sequence.computed, sequence.tail = sequence.length, []
        sequence.segments.append(PlacedSegment(thought, sequence.length, sequence.rope))
        job.main = KVPrefix(0, sequence.length, sequence.rope)
        reason = self._too_long(job)
        if reason is not None:
            self._release(job)
            return [Failed(job.request_id, InputError(reason))]
        if not self.scheduler.grow(sequence, sequence.length):
            self.scheduler.preempt(job)
        return []
