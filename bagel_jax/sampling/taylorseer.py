"""TaylorSeer: at most steps, the trunk's last hidden states are forecast instead of computed.

Officially every layer keeps its own expansion, and each skipped layer's output is overwritten by the next layer's; only
the last layer's reaches the result, so only that one is kept here. Each branch of each request counts its own steps:
a branch that is off outside the guidance interval stands still meanwhile.

Source: Liu et al., "From Reusable to Forecastable: Accelerating Diffusion Models with TaylorSeers"; official
`modeling/cache_utils/taylorseer.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclass
class TaylorState:
    """Where one branch of one request stands; on the host.

    Args:
        interval: every so many steps one is computed, after the first ones.
        order: of the expansion.
        first: so many steps are all computed.
    """

    interval: int
    order: int
    first: int
    step: int = 0  # steps that the branch has taken
    terms: int = 0  # of the expansion that there are
    last: int = 0  # the last step that was computed

    @property
    def computes(self) -> bool:
        """Whether the next step must be computed."""
        return self.step < self.first or self.steps_ahead <= 0

    @property
    def steps_ahead(self) -> int:
        """Steps that may be forecast before the next computed one."""
        return self.last + self.interval - self.step

    @property
    def known(self) -> int:
        """Terms of the old expansion that the next computed step may take differences from."""
        return min(self.terms, self.order) if self.step > self.first - 2 else 0

    @property
    def distance(self) -> int:
        """Steps between the step to be computed and the last computed one."""
        return self.step - self.last

    def take(self, count: int = 1) -> None:
        """Notes that `count` steps were taken: one that was computed, or several that were forecast."""
        if self.computes:
            self.terms = self.known + 1
            self.last = self.step
        self.step += count


class Forecasts(NamedTuple):
    """What one call needs of the `TaylorState` of every view of every request; `[Q, V]` each."""

    known: jax.Array  # int32
    distance: jax.Array  # float32; of a view that is forecast: from its last computed step to the call's first
    forecast: jax.Array  # bool: the view is forecast in this call


def update(terms: jax.Array, hidden: jax.Array, known: jax.Array, distance: jax.Array) -> jax.Array:
    """The expansion around a computed step.

    Args:
        terms: the old expansion, `[R, M + 1, N, D]`.
        hidden: what was computed, `[R, N, D]`.
        known, distance: see `Forecasts`, `[R]`.

    Returns:
        The new one, likewise; terms that are not known are zero.
    """
    new = [hidden.astype(terms.dtype)]
    for i in range(terms.shape[1] - 1):
        there = (i < known)[:, None, None]
        change = (new[i] - terms[:, i]) / jnp.maximum(distance, 1).astype(terms.dtype)[:, None, None]
        new.append(jnp.where(there, change, 0))
    return jnp.stack(new, axis=1)


def expand(terms: jax.Array, distance: jax.Array) -> jax.Array:
    """Hidden states `[..., N, D]` from expansions `[..., M + 1, N, D]`, `distance` `[...]` steps further on."""
    total = terms[..., 0, :, :]
    for i in range(1, terms.shape[-3]):
        factor = (distance**i / math.factorial(i)).astype(terms.dtype)
        total = total + terms[..., i, :, :] * factor[..., None, None]
    return total
