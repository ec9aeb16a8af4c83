"""Running stage 1 by hand: a number of evaluations in a call, or one by one."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from bagel_jax.bagel import Bagel
from bagel_jax.engine.denoise import steps as loop
from bagel_jax.engine.denoise.batch import batch_of, padded_tokens, rows_of
from bagel_jax.engine.denoise.jobs import Work
from bagel_jax.engine.denoise.stage import DenoiseStage
from bagel_jax.engine.handoff import ContextKV
from bagel_jax.inputs.prepare import Prepared
from bagel_jax.settings import ServingSettings


@partial(jax.jit, static_argnames=("static",))
def _one_step(static, params, state, batch, rows):
    return loop.one_step(static.skeleton.merge(params), static, state, 0, batch, rows, None)


class Denoising:
    """Requests that are denoised together, without TaylorSeer."""

    def __init__(self, model: Bagel, *requests: tuple[Prepared, ContextKV]):
        weights, self._config = model.load_weights(), model.config
        settings = ServingSettings(dit_max_num_seqs=len(requests))
        stage = DenoiseStage(weights, model.config, model.dtype, model.tokenizer, settings)
        for prepared, context in requests:
            stage.submit(prepared, context)
        self.works, self.state, self._params = stage._works(), stage._state, stage.weights.arrays
        self._markers = np.asarray([model.tokenizer.vision_start, model.tokenizer.vision_end], np.int32)
        self._count = padded_tokens(self.works, self._config)
        self._static = loop.Program(stage.weights.skeleton, stage.backend, self._count)

    @property
    def busy(self) -> list[Work]:
        """Requests that are not done."""
        return [work for work in self.works if work.done < work.total]

    def latents(self, slot: int = 0) -> np.ndarray:
        """Where a request stands, `[N, C p²]`."""
        return np.array(self.state.latents[slot, : self.works[slot].tokens])

    def _arguments(self) -> tuple[loop.Batch, loop.Rows]:
        slots = len(self.works)
        return batch_of(self.busy, slots, self._count, self._config, self._markers), rows_of(self.busy, slots)

    def evaluate(self) -> np.ndarray:
        """One evaluation in a call of `one_step`; returns the guided velocities `[Q, N, C p²]`, padded."""
        velocity, self.state = _one_step(self._static, self._params, self.state, *self._arguments())
        for work in self.busy:
            work.take(1)
        return np.asarray(velocity)

    def call(self, steps: int) -> None:
        """One call of `denoise`, of evaluations that are alike."""
        args = self._params, self.state, *self._arguments(), None
        self.state = loop.denoise(self._static, *args, np.int32(steps))
        for work in self.busy:
            work.take(steps)

    def advance(self, count: int) -> None:
        """So many evaluations, in as few calls of `denoise` as possible."""
        while count > 0:
            steps = min(count, *(work.steps_alike() for work in self.busy))
            self.call(steps)
            count -= steps
