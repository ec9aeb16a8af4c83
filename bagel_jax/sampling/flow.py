"""Guidance and solvers as values: what a denoise loop is made of, to be swapped for another.

Source: `_forward_flow` and `generate_image` in the official `modeling/bagel/bagel.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax

from bagel_jax.request import Settings
from bagel_jax.sampling.guidance import branches_on, combine, guidance
from bagel_jax.sampling.schedule import guided


class Velocities(NamedTuple):
    """Of the three branches, each `[N, C p²]`; finite, but of no meaning, where a branch was not needed."""

    cond: jax.Array
    drop_text: jax.Array
    drop_image: jax.Array


class Guiding(Protocol):
    """How three velocities become one. Static in programs, so frozen and hashable; what changes is its state."""

    def init(self, shape: tuple[int, ...]) -> Any:
        """The state before the first step, a pytree, for latents `shape`."""

    def needs(self, t: jax.Array) -> tuple[bool | jax.Array, bool | jax.Array]:
        """Whether `drop_text` and `drop_image` are to be computed at timestep `t`: Python's bool, or traced."""

    def __call__(self, step, t, state, velocities: Velocities, x) -> tuple[jax.Array, Any]:
        """The guided velocity `[N, C p²]` of latents `x` at `t` in step number `step`, and the next state."""


# velocity, state = field(x, t, state): the guided velocity of any latents at any timestep.
Field = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class Solver(Protocol):
    """How velocities move latents. Static in programs; may ask for the guided velocity anywhere, several times."""

    def __call__(self, field: Field, x, t, following, state) -> tuple[jax.Array, Any]:
        """Latents `x` `[N, C p²]` moved from timestep `t` to the `following` one, and the guidance's next state."""


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance as a request's settings have it; keeps no state."""

    settings: Settings = dataclasses.field(default_factory=Settings)

    def init(self, shape: tuple[int, ...]) -> None:
        """Nothing."""

    def needs(self, t: jax.Array) -> tuple[bool | jax.Array, bool | jax.Array]:
        """Those that are switched on, within the interval."""
        return tuple(on and guided(t, self.settings.cfg_interval) for on in branches_on(self.settings, True))

    def __call__(self, step, t, state, velocities: Velocities, x) -> tuple[jax.Array, None]:
        """See `combine`; outside the interval it is `cond`'s."""
        if not branches_on(self.settings, True)[0]:
            return velocities.cond, state
        within = guided(t, self.settings.cfg_interval)
        scales = guidance(self.settings)
        return jax.lax.cond(within, lambda: combine(*velocities, scales), lambda: velocities.cond), state


def cfg(
    text_scale: float = 4.0,
    img_scale: float = 1.5,
    *,
    interval: tuple[float, float] = (0.4, 1.0),
    renorm_type: str = "global",
    renorm_min: float = 0.0,
) -> CFG:
    """Classifier-free guidance, on at timesteps lo < t <= hi; a scale of 1 or less switches its branch off.

    Raises:
        InputError: a value out of range.
    """
    given = {"text_scale": text_scale, "img_scale": img_scale, "interval": interval}
    given |= {"renorm_type": renorm_type, "renorm_min": renorm_min}
    return CFG(Settings(**{f"cfg_{name}": value for name, value in given.items()}))


def euler(field: Field, x: jax.Array, t: jax.Array, following: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    """The official solver: straight on."""
    v, state = field(x, t, state)
    return x - v * (t - following), state
