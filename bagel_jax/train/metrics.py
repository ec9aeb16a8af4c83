"""Speed and losses, to the terminal and to files that TensorBoard reads."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from bagel_jax.config import BagelConfig
from bagel_jax.train.packing import Batch

# Dense bfloat16 TFLOP/s of one device, from the makers' data sheets, by what `device_kind` contains.
_PEAK_TFLOPS = {
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5p": 459.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
}


def peak_tflops() -> float | None:
    """Peak of one of this process's devices; None where it is not known (a CPU)."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in _PEAK_TFLOPS.items() if name in kind), None)


def batch_tflop(batch: Batch, config: BagelConfig) -> float:
    """Work of one batch in the trunk, forward and backward, in 1e12 operations; what remat repeats is not counted.

    Source: `qwen2_flop_coefficients` in the official `train/pretrain_unified_navit.py`: 6 operations a token and
    weight, 12 E H L a pair of tokens of a sample.
    """
    t = config.trunk
    projections = t.hidden_size * t.head_dim * (2 * t.num_heads + 2 * t.num_kv_heads)
    dense = t.num_layers * (projections + 3 * t.hidden_size * t.mlp_width)
    sample = np.asarray(batch.mask.segment_ids).reshape(-1, batch.mask.segment_ids.shape[-1])
    tokens = int((sample > 0).sum())
    texts = int((np.asarray(batch.labels) >= 0).sum())
    pairs = sum(int((np.bincount(row[row > 0]) ** 2).sum()) for row in sample)
    work = 6.0 * (tokens * dense + texts * t.hidden_size * t.vocab_size)
    return (work + 12.0 * t.head_dim * t.num_heads * t.num_layers * pairs) / 1e12


class Metrics:
    """A progress bar, a line of numbers every `log_every` steps, and the same as TensorBoard scalars.

    Args:
        folder: where TensorBoard's files go.
        start, steps: steps done before this run, and in all.
        log_every: how often, in steps.
        peak: TFLOP/s of all devices together, or None.
        unit: what `count` in `update` counts.
        quiet: no progress bar.
    """

    def __init__(
        self, folder: Path, start: int, steps: int, log_every: int, peak: float | None, unit: str, *, quiet: bool
    ):
        self._writer = SummaryWriter(str(folder))
        self._bar = tqdm(initial=start, total=steps, unit="step", file=sys.stderr, disable=quiet)
        self._log_every, self._peak, self._unit = log_every, peak, unit
        self._count = self._work = 0.0
        self._since: float | None = None
        self.last: dict[str, float] = {}

    def update(self, step: int, report: dict[str, jax.Array], count: int, tflop: float) -> None:
        """One more step is under way; every `log_every` steps its numbers are waited for and written.

        Args:
            step: steps done, this one included.
            report: scalars from the step.
            count: tokens (or images) of the step.
            tflop: its work.
        """
        self._count, self._work = self._count + count, self._work + tflop
        self._bar.update()
        if step % self._log_every:
            return
        numbers = {name: float(value) for name, value in report.items()}
        now = time.perf_counter()
        if self._since is not None:  # the first interval holds the compilation
            seconds = now - self._since
            numbers[f"{self._unit}_per_second"] = self._count / seconds
            if self._peak is not None and self._work:
                numbers["mfu"] = self._work / seconds / self._peak
        self._since, self._count, self._work = now, 0.0, 0.0
        self.last = numbers
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in numbers.items()})

    def close(self) -> None:
        """Writes what is left."""
        self._bar.close()
        self._writer.close()
