"""Adaptive projected guidance, written outside the package: strong guidance without colours that are too strong.

python examples/apg.py [CHECKPOINT]     # without: the bundled model

Source: Sadat, Hilliges and Weber, "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion
Models", ICLR 2025.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import jax.numpy as jnp

from bagel_jax import Bagel, Request
from bagel_jax import functional as F

PROMPT = "a red circle on a white background"


@dataclass(frozen=True)
class APG:
    """Guides what the latents would become; keeps a running sum of the differences, with negative momentum."""

    scale: float = 4.0
    along: float = 0.0  # how much is kept of what points along the prediction, which only makes it stronger
    radius: float = 15.0  # the difference is made no longer than this
    momentum: float = -0.5

    def init(self, shape):
        """Nothing summed yet."""
        return jnp.zeros(shape)

    def needs(self, t):
        """The branch without text, always."""
        return True, False

    def __call__(self, step, t, state, velocities, x):
        """The velocity towards the guided prediction, and the new sum."""
        clean, other = x - t * velocities.cond, x - t * velocities.drop_text
        state = clean - other + self.momentum * state
        update = state * jnp.minimum(1, self.radius / jnp.linalg.norm(state))
        parallel = clean * (update * clean).sum() / (clean**2).sum()
        guided = clean + (self.scale - 1) * (update - (1 - self.along) * parallel)
        return (x - guided) / t, state


def main(checkpoint: str | None = None) -> None:
    """Colours of the same image under both kinds of guidance, at growing scales."""
    bagel = Bagel.load(checkpoint)
    definition, params = bagel.functional()
    prepared = bagel.prepare(Request.create("text2img", PROMPT, height=64, width=64, seed=1))
    contexts, grid = F.contexts(definition, params, prepared), prepared.latent_grid
    print("scale  guidance  length of the latents  middle (red)    corner (white)")
    for scale in (2.0, 4.0, 8.0, 16.0):
        plain = F.cfg(scale, 1.0, interval=(0.0, 1.0), renorm_min=1.0)  # as in the textbook: never renormed
        for name, guidance in (("CFG", plain), ("APG", APG(scale))):
            x = F.denoise(
                definition, params, prepared.initial_latent, contexts, grid, F.timesteps(25, 3.0), guidance=guidance
            )
            pixels = F.decode(definition, params, x, grid)
            colours = (" ".join(f"{value:.2f}" for value in pixels[i, i]) for i in (32, 2))
            print(f"{scale:5.1f}  {name:8s}  {jnp.linalg.norm(x):21.1f}", *colours, sep="  ")


if __name__ == "__main__":
    main(*sys.argv[1:2])
