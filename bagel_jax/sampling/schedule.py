"""Timesteps of rectified flow, from noise (1) to data (0)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bagel_jax.request import MAX_STEPS


class Schedule(NamedTuple):
    """One entry an evaluation, padded to `MAX_STEPS` so that another number of steps compiles nothing."""

    timesteps: np.ndarray  # [MAX_STEPS] float32
    deltas: np.ndarray  # [MAX_STEPS] float32, how far each evaluation moves towards 0
    guided: np.ndarray  # [MAX_STEPS] bool, whether the timestep is in the guidance interval


def timesteps(steps: int, shift: float) -> np.ndarray:
    """The `steps` points of the schedule, float32, bit for bit what `torch.linspace` and the official shift give.

    Bits matter where a timestep falls on the border of the guidance interval. PyTorch fills the first half from the
    start and the second from the end, each with a fused multiply-add, which rounds once: here in float64.
    """
    step = np.float64(np.float32(-1) / np.float32(steps - 1))
    i = np.arange(steps)
    t = np.where(i < steps // 2, 1 + step * i, -step * (steps - 1 - i)).astype(np.float32)
    return np.float32(shift) * t / (np.float32(1) + np.float32(shift - 1) * t)


def guided(t: Any, interval: tuple[float, float]) -> Any:
    """Whether guidance is on at timesteps, lo < t <= hi in float32; of NumPy or traced."""
    low, high = np.float32(interval[0]), np.float32(interval[1])
    return (t > low) & (t <= high)


def schedule(steps: int, shift: float, interval: tuple[float, float]) -> Schedule:
    """The evaluations of a request: `steps` schedule points are `steps - 1` evaluations.

    Args:
        steps: schedule points, 2 to `MAX_STEPS`.
        shift: timestep shift; above 1 spends more steps near the noise.
        interval: guidance is on at timesteps lo < t <= hi.
    """
    points = timesteps(steps, shift)
    t, deltas = points[:-1], points[:-1] - points[1:]
    padding = (0, MAX_STEPS - len(t))
    return Schedule(np.pad(t, padding), np.pad(deltas, padding), np.pad(guided(t, interval), padding))
