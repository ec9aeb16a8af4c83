"""Running stage 1 by hand: a number of evaluations in a call, or one by one."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from bagel_jax.bagel import Bagel
from bagel_jax.engine.denoise import steps as loop
from bagel_jax.engine.denoise.batch import denoise_batch, denoise_rows, padded_tokens
from bagel_jax.engine.denoise.jobs import DenoiseJob
from bagel_jax.engine.denoise.stage import DenoiseStage
from bagel_jax.engine.handoff import ContextKV
from bagel_jax.engine.kv.store import KVStore, all_blocks, largest_context
from bagel_jax.engine.ticket import Ticket
from bagel_jax.inputs.prepare import Prepared
from bagel_jax.placement.spread import ONE_DEVICE
from bagel_jax.request import Result
from bagel_jax.settings import EngineConfig


@partial(jax.jit, static_argnames=("static",))
def _one_step(static, params, state, batch, rows):
    return loop.one_step(static.skeleton.merge(params), static, state, 0, batch, rows, None)


def ticket_of(prepared: Prepared, context: ContextKV | None = None, number: int = 0) -> Ticket:
    """A request as the engine takes it in."""
    request = prepared.request
    return Ticket(number, prepared, context, False, 0.0, Result(request.request_id, request.modality))


class Denoising:
    """Requests that are denoised together, without TaylorSeer."""

    def __init__(self, model: Bagel, *requests: tuple[Prepared, ContextKV]):
        weights, config = model.load_weights()[1], model.config
        settings, slots = EngineConfig(dit_max_num_seqs=len(requests)), len(requests)
        size = settings.page_size
        each = largest_context(config, size) + all_blocks(config.max_latent_size**2, size)
        store = KVStore(model.placements[1], config, size, 1 + slots * each, model.dtype)
        stage = DenoiseStage(weights, config, model.tokenizer, settings, store)
        for number, request in enumerate(requests):
            ticket = ticket_of(*request, number)
            stage.check(ticket, 0)
            assert stage.accept(ticket, 0.0)
        self.jobs, self._params, self._config = stage.jobs, stage.weights.arrays, config
        self.state = loop.DenoiseState(stage.latents, store.pages, None)
        self._markers = np.asarray([model.tokenizer.vision_start, model.tokenizer.vision_end], np.int32)
        self._count = padded_tokens(max(job.tokens for job in self.jobs), config, ONE_DEVICE)
        self._static = loop.DenoiseProgram(stage.weights.skeleton, stage.backend, self._count)

    @property
    def busy(self) -> list[DenoiseJob]:
        """Requests that are not done."""
        return [job for job in self.jobs if job.done < job.total]

    def latents(self, slot: int = 0) -> np.ndarray:
        """Where a request stands, `[N, C p²]`."""
        return np.array(self.state.latents[slot, : self.jobs[slot].tokens])

    def _arguments(self) -> tuple[loop.DenoiseBatch, loop.DenoiseRows]:
        slots = len(self.jobs)
        batch = denoise_batch(self.busy, slots, self._count, self._config, self._markers)
        return batch, denoise_rows(self.busy, slots)

    def evaluate(self) -> np.ndarray:
        """One evaluation in a call of `one_step`; returns the guided velocities `[Q, N, C p²]`, padded."""
        velocity, self.state = _one_step(self._static, self._params, self.state, *self._arguments())
        for job in self.busy:
            job.take(1)
        return np.asarray(velocity)

    def call(self, steps: int) -> None:
        """One call of `denoise`, of evaluations that are alike."""
        args = self._params, self.state, *self._arguments(), None
        self.state, _ = loop.denoise(self._static, *args, np.int32(steps))
        for job in self.busy:
            job.take(steps)

    def advance(self, count: int) -> None:
        """So many evaluations, in as few calls of `denoise` as possible."""
        while count > 0:
            steps = min(count, *(job.steps_alike() for job in self.busy))
            self.call(steps)
            count -= steps
