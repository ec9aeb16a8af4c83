"""AdamW with warm-up, as the official `train/pretrain_unified_navit.py` has it."""

from __future__ import annotations

import optax

from bagel_jax.train.config import OptimizerTable


def learning_rate(o: OptimizerTable, steps: int) -> optax.Schedule:
    """From 0 up in `warmup_steps`, then constant, or down a cosine to `min_learning_rate` at `steps`."""
    if o.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0, o.learning_rate, o.warmup_steps, steps, min(o.min_learning_rate, o.learning_rate)
        )
    return (
        optax.linear_schedule(0.0, o.learning_rate, o.warmup_steps)
        if o.warmup_steps
        else (optax.constant_schedule(o.learning_rate))
    )


def make_optimizer(o: OptimizerTable, steps: int) -> optax.GradientTransformation:
    """Gradients clipped by their global norm, then AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(o.max_grad_norm),
        optax.adamw(learning_rate(o, steps), o.beta1, o.beta2, o.epsilon, weight_decay=o.weight_decay),
    )
