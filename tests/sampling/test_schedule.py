"""Timesteps, bit for bit, and where guidance is on."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bagel_jax.request import MAX_STEPS
from bagel_jax.sampling.schedule import schedule, timesteps

# float32 bits of `t = torch.linspace(1, 0, steps); shift * t / (1 + (shift - 1) * t)`, PyTorch on a CPU.
TORCH = {
    (2, 3.0): "3f800000 0",
    (4, 1.3): "3f800000 3f38e38c 3ec9b26c 0",
    (4, 3.0): "3f800000 3f5b6db6 3f199999 0",
    (5, 3.0): "3f800000 3f666666 3f400000 3f000000 0",
    (6, 1.0): "3f800000 3f4ccccd 3f19999a 3ecccccd 3e4ccccd 0",
    (7, 4.0): "3f800000 3f73cf3d 3f638e38 3f4ccccd 3f2aaaab 3ee38e39 0",
    (8, 2.5): "3f800000 3f700000 3f5cb08e 3f44ec4e 3f26f4df 3f000000 3e969697 0",
}
# First digits of the SHA-256 of the same for more steps.
TORCH_HASHES = {
    (50, 1.0): "d4deb650119f2c3f",
    (50, 3.0): "2e303820aa08a609",
    (24, 5.0): "b435f89ee35f339e",
    (1000, 3.0): "5a5a7fd68bcec076",
}


@pytest.mark.parametrize(("steps", "shift"), TORCH)
def test_timesteps_are_torchs(steps, shift):
    """Timesteps are off by rounding, which switches guidance on or off at the border of its interval."""
    ours = timesteps(steps, shift)
    assert ours.dtype == np.float32
    assert " ".join(f"{bits:x}" for bits in ours.view(np.uint32)) == TORCH[steps, shift]


@pytest.mark.parametrize(("steps", "shift"), TORCH_HASHES)
def test_many_timesteps_are_torchs(steps, shift):
    """As above, for schedules too long to print."""
    digest = hashlib.sha256(timesteps(steps, shift).tobytes()).hexdigest()
    assert digest.startswith(TORCH_HASHES[steps, shift])


@pytest.mark.parametrize("steps", [2, 3, 50, MAX_STEPS])
def test_regression_10_n_points_are_one_evaluation_fewer(steps):
    """N evaluations are made of N schedule points: the last moves nowhere, or past the data."""
    plan = schedule(steps, 3.0, (0.0, 1.0))
    assert len(timesteps(steps, 3.0)) == steps
    assert np.count_nonzero(plan.deltas) == np.count_nonzero(plan.guided) == steps - 1
    assert plan.timesteps[0] == 1
    assert plan.timesteps[steps - 2] == plan.deltas[steps - 2] > 0  # the last evaluation ends at 0
    assert not plan.timesteps[steps - 1 :].any()


def test_regression_11_two_points_are_one_evaluation():
    """The smallest number of steps divides by zero."""
    plan = schedule(2, 3.0, (0.4, 1.0))
    assert (plan.timesteps[0], plan.deltas[0], plan.guided[0]) == (1, 1, True)
    assert not plan.deltas[1:].any()
    assert all(np.isfinite(x).all() for x in plan)


@settings(deadline=None, max_examples=100)
@given(steps=st.integers(2, MAX_STEPS), shift=st.floats(0.1, 20))
def test_every_schedule_goes_from_noise_to_data(steps, shift):
    """A schedule turns back, stands still, or ends before the data."""
    t = timesteps(steps, shift)
    assert t[0] == pytest.approx(1, abs=1e-6)  # for some shifts not quite 1, as in the official code
    assert t[-1] == 0
    assert (np.diff(t) < 0).all()
    plan = schedule(steps, shift, (0.0, 1.0))
    assert np.array_equal(plan.deltas[: steps - 1], t[:-1] - t[1:])
    assert np.sum(plan.deltas, dtype=np.float64) == pytest.approx(1, abs=1e-5)
    assert (plan.deltas[: steps - 1] > 0).all()


def test_shift():
    """The shift has no effect, or spends its steps near the data."""
    plain, shifted = timesteps(50, 1.0), timesteps(50, 3.0)
    np.testing.assert_allclose(plain, np.linspace(1, 0, 50), atol=1e-6)
    np.testing.assert_allclose(shifted, 3 * plain / (1 + 2 * plain), atol=1e-6)
    assert (shifted[1:-1] > plain[1:-1]).all()


@pytest.mark.parametrize(
    ("steps", "shift", "interval", "guided"),
    [
        # Official `t > lo and t <= hi` on float32 t. Points 1, 0.8, 0.6, 0.4, 0.2, 0:
        (6, 1.0, (0.4, 1.0), [True, True, True, False, False]),  # 0.4 itself is out
        (6, 1.0, (0.0, 0.6), [False, False, True, True, True]),  # 0.6 itself is in
        (6, 1.0, (0.0, 1.0), [True] * 5),
        (6, 1.0, (0.2, 0.8), [False, True, True, True, False]),
        (6, 1.0, (0.6, 0.6), [False] * 5),
        (6, 1.0, (1.0, 1.0), [False] * 5),
        (6, 1.0, (0.0, 0.0), [False] * 5),
        # Points 1, 0.9, 0.75, 0.5, 0:
        (5, 3.0, (0.5, 1.0), [True, True, True, False]),
        (5, 3.0, (0.0, 0.75), [False, False, True, True]),
        # 0.4 at point 9 of 12, just below it in float32 at point 26 of 34: both out.
        (12, 3.0, (0.4, 1.0), [True] * 9 + [False] * 2),
        (34, 3.0, (0.4, 1.0), [True] * 27 + [False] * 6),
    ],
)
def test_borders_of_the_interval(steps, shift, interval, guided):
    """Guidance is on for a step more or less than in the official code."""
    assert schedule(steps, shift, interval).guided[: steps - 1].tolist() == guided


def test_one_program_for_all_numbers_of_steps():
    """Another number of steps compiles for a minute."""
    shapes = {tuple((x.shape, x.dtype.name) for x in schedule(n, 3.0, (0.4, 1.0))) for n in (2, 50, MAX_STEPS)}
    assert shapes == {(((MAX_STEPS,), "float32"), ((MAX_STEPS,), "float32"), ((MAX_STEPS,), "bool"))}
    assert not schedule(5, 3.0, (0.0, 1.0)).guided[4:].any()
