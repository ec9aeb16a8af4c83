"""What is reported of a run, and the work that its speed is measured by."""

from __future__ import annotations

import types

import jax
import pytest
from training import TINY, full_batch, scalars

from bagel_jax.train import metrics as module
from bagel_jax.train.metrics import Metrics, batch_tflop, peak_tflops


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand, in seconds."""
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now.seconds)
    return now


def test_scalars_are_written_and_read_back(tmp_path, clock):
    """TensorBoard shows nothing, numbers of other steps, or a speed that counts the compilation."""
    metrics = Metrics(tmp_path, 4, 10, 2, 50.0, "tokens", quiet=True)
    for step in range(5, 11):
        clock.seconds += 60 if step == 5 else 2
        metrics.update(step, {"loss": step / 8, "ce": 1.0}, 300, 40.0)
    metrics.close()
    found = scalars(tmp_path)
    assert found["loss"] == {6: 0.75, 8: 1.0, 10: 1.25}
    assert found["ce"] == {6: 1.0, 8: 1.0, 10: 1.0}
    assert found["tokens_per_second"] == {8: 150.0, 10: 150.0}  # two steps in four seconds
    assert found["mfu"] == pytest.approx({8: 0.4, 10: 0.4})
    assert metrics.last == pytest.approx({"loss": 1.25, "ce": 1.0, "tokens_per_second": 150.0, "mfu": 0.4})


def test_without_a_known_peak_there_is_no_mfu(tmp_path, clock):
    """A CPU run fails, or reports a share of nothing."""
    metrics = Metrics(tmp_path, 0, 4, 1, None, "images", quiet=True)
    for step in (1, 2):
        clock.seconds += 1
        metrics.update(step, {"loss": 1.0}, 3, 40.0)
    metrics.close()
    assert set(scalars(tmp_path)) == {"loss", "images_per_second"}


def test_work_by_hand():
    """Utilisation is reported of another model, or grows with padding."""
    batch = jax.tree.map(lambda x: x[0], full_batch())
    # A sample: 3 + 6 texts, three images of 4 tokens and 2 markers, in each of two rows; 5 tokens are learned.
    tokens, learned = 2 * (3 + 6 + 3 * 6), 2 * 5
    d, f, v, h, k, e = 16, 24, 768, 2, 1, 8
    a_token = 2 * (d * h * e + 2 * d * k * e + h * e * d + 3 * d * f)  # weights of two layers
    pairs = 2 * 27**2
    attention = 2 * (2 * 2 * h * e) * pairs * 3  # two layers, scores and values, two operations each; backward twice
    expected = 3 * 2 * (tokens * a_token + learned * d * v) + attention
    assert (TINY.trunk.num_layers, TINY.trunk.mlp_width, TINY.trunk.vocab_size) == (2, f, v)
    assert batch_tflop(batch, TINY) * 1e12 == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("TPU v4", 275.0),
        ("TPU v5 lite", 197.0),
        ("TPU v5p", 459.0),
        ("TPU v5", 459.0),
        ("TPU v6 lite", 918.0),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak, monkeypatch):
    """Utilisation is off by a factor: a chip is taken for another of nearly the same name."""
    monkeypatch.setattr(module.jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    assert peak_tflops() == peak
