"""Which kernels a piece of work spends its time in, by JAX's profiler."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import jax


def profile(work: Callable[[], object], top: int = 25) -> None:
    """Runs `work` under the profiler and prints the device's busiest kernels, and how busy it was."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(work())
        file = next(Path(folder).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(file))
        for plane in data.planes:
            if "GPU" not in plane.name:
                continue
            total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
            first, last, busy = float("inf"), 0.0, 0.0
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    total[event.name][0] += event.duration_ns
                    total[event.name][1] += 1
                    first, last = min(first, event.start_ns), max(last, event.start_ns + event.duration_ns)
                    busy += event.duration_ns
            if not total:
                continue
            print(f"{plane.name}: {(last - first) / 1e6:.2f} ms, busy {100 * busy / (last - first):.0f} %")
            for name, (spent, count) in sorted(total.items(), key=lambda item: -item[1][0])[:top]:
                print(f"  {spent / 1e6:9.3f} ms {count:6} x {name[:110]}")
