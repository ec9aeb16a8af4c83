"""A worker's memory does not grow with the number of lines."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest

from bagel_jax.bagel import Bagel
from bagel_jax.batch.job import Defaults, Job
from bagel_jax.batch.output import JobFolder
from bagel_jax.batch.sources import JsonLines
from bagel_jax.batch.worker import Worker
from bagel_jax.demo.example import MODEL

WARM = 1000  # lines after which caches are full
STATM = Path("/proc/self/statm")


@pytest.mark.slow
@pytest.mark.by_hand
@pytest.mark.parametrize("count", [2000, 20_000])
@pytest.mark.skipif(not STATM.exists(), reason="memory is read as Linux tells it")
def test_memory_is_flat(tmp_path, count):
    """A job of ten million lines ends for want of memory after a day."""
    path = tmp_path / "job.jsonl"
    path.write_text("\n".join(json.dumps({"modality": "text2text", "prompt": f"What is {i}?"}) for i in range(count)))
    worker = Worker(Job(JsonLines(path)), JobFolder(tmp_path / "out", {}), 100, Defaults({"max_tokens": 1}))
    seen = {}

    def tell(counts):
        if counts.done in (WARM, count - 50):
            gc.collect()
            seen[counts.done] = len(gc.get_objects()), 4096 * int(STATM.read_text().split()[1])

    model = Bagel.open(MODEL, "float32")
    try:
        worker.run(model.run_many, tell)
    finally:
        model.close()
    (objects, memory), (more_objects, more_memory) = seen[WARM], seen[count - 50]
    print(
        f"{more_objects - objects:,} objects, {(more_memory - memory) / 2**20:.1f} MiB in {count - WARM - 50:,} lines"
    )
    # The driver's record of its calls, one for some lines, ends at 100,000.
    assert more_objects - objects < 0.7 * (count - WARM)
    assert more_memory - memory < 2**24
