"""One step of training: gradients of what is trained, the optimiser, the running average."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

# Parameters by dotted path (models/weights.flatten).
Params = dict[str, jax.Array]
# loss(trainable, frozen, batch, key) -> loss, what to report of it
LossFunction = Callable[[Params, Params, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that training changes; float32. What is frozen is not in it."""

    step: jax.Array  # scalar int32, steps done
    trainable: Params
    ema: Params
    optimizer: optax.OptState

    @classmethod
    def create(cls, trainable: Params, optimizer: optax.GradientTransformation) -> TrainState:
        """The state before the first step."""
        ema = jax.tree.map(jnp.copy, trainable)
        return cls(jnp.int32(0), trainable, ema, optimizer.init(trainable))


def make_step(loss: LossFunction, optimizer: optax.GradientTransformation, *, ema: float, seed: int):
    """The jitted step.

    Args:
        loss: the objective.
        optimizer: from `make_optimizer`.
        ema: decay of the average.
        seed: of the randomness in the loss; with the number of the step it gives the step's key.

    Returns:
        `step(state, frozen, batches) -> state, report`. `batches` is a batch with one more axis in front, over which
        gradients are averaged (gradient accumulation); `report` holds scalars. The old state is given up.
    """

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, frozen: Params, batches: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        count = jax.tree.leaves(batches)[0].shape[0]
        gradient = jax.value_and_grad(loss, has_aux=True)

        def one(batch, number):
            (value, report), grads = gradient(state.trainable, frozen, batch, jax.random.fold_in(key, number))
            return grads, report | {"loss": value}

        if count == 1:
            grads, report = one(jax.tree.map(lambda x: x[0], batches), 0)
        else:

            def add(total, numbered):
                return jax.tree.map(jnp.add, total, one(*numbered)), None

            shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], batches), 0)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            total, _ = jax.lax.scan(add, zeros, (batches, jnp.arange(count)))
            grads, report = jax.tree.map(lambda x: x / count, total)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        average = optax.incremental_update(trainable, state.ema, 1 - ema)
        report["grad_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, trainable, average, optimizer_state), report

    return step
