"""Heun's solver, written outside the package: two evaluations a step, and an error that falls with the step's square.

python examples/heun.py [CHECKPOINT]     # without: the bundled model
"""

from __future__ import annotations

import sys
from functools import partial

import jax.numpy as jnp

from bagel_jax import Bagel, Request
from bagel_jax import functional as F

PROMPT = "a red circle on a white background"


def heun(field, x, t, following, state):
    """A step of Euler's, then again with the mean of the velocities at both ends; the last one, to 0, is Euler's."""
    v, state = field(x, t, state)
    ahead = x - v * (t - following)
    w, state = field(ahead, following, state)
    return jnp.where(following > 0, x - (v + w) / 2 * (t - following), ahead), state


def main(checkpoint: str | None = None) -> None:
    """How far both solvers are from a solution of many small steps, after as many evaluations."""
    bagel = Bagel.load(checkpoint)
    definition, params = bagel.functional()
    prepared = bagel.prepare(Request.create("text2img", PROMPT, height=64, width=64, seed=1))
    contexts = F.contexts(definition, params, prepared)
    run = partial(F.denoise, definition, params, prepared.initial_latent, contexts, prepared.latent_grid)
    # With guidance in an interval the velocity jumps at its border, where no solver is of second order.
    run = partial(run, guidance=F.cfg(interval=(0.0, 1.0)))
    exact = run(F.timesteps(301, 3.0), solver=heun)
    print("evaluations  Euler   Heun    (distance from Heun's with 600, relative)")
    for steps in (9, 17, 33, 65):
        euler, second = run(F.timesteps(2 * steps - 1, 3.0)), run(F.timesteps(steps, 3.0), solver=heun)
        far = [float(jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact)) for x in (euler, second)]
        print(f"{2 * steps - 2:11d}  {far[0]:.4f} {far[1]:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
