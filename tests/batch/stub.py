"""A worker whose model makes images of numbers, in a process that a test may kill.

`python stub.py JOB DIR SIZE [SECONDS]`: lines of a part, and seconds that a request takes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from bagel_jax.batch.__main__ import signals
from bagel_jax.batch.job import Defaults, Job, identity
from bagel_jax.batch.output import JobFolder
from bagel_jax.batch.sources import JsonLines
from bagel_jax.batch.worker import Worker
from bagel_jax.request import Request, Result

SECONDS = 0.001  # of a request
GRACE = 5


def run_many(requests: Iterable[Request]) -> Iterator[tuple[Request, Result | Exception]]:
    """Three at once, the last one first; a text by its prompt, an image by its seed."""
    work, requests, more = [], iter(requests), True
    while more or work:
        while more and len(work) < 3:
            one = next(requests, None)
            more = one is not None
            work += [one] * more
        if not work:
            return
        request = work.pop()
        time.sleep(SECONDS)
        if request.makes_image:
            pixels = np.random.RandomState(request.seed).randint(0, 256, (8, 8, 3)).astype(np.uint8)
            yield request, Result(request.request_id, request.modality, image=Image.fromarray(pixels))
        elif "fail" in request.prompt:
            yield request, FloatingPointError("the latents are not finite")
        else:
            yield request, Result(request.request_id, request.modality, text=request.prompt.upper())


def work(job: Path, output: Path, size: int, usual: Defaults | None = None, tar: bool = False, **options) -> Worker:
    """A worker that has ended."""
    file, usual = Job(JsonLines(job)), usual or Defaults()
    how = {"shard_size": size, "format": "webdataset" if tar else "files"}
    folder = JobFolder(output, identity(file, Path(__file__).parent, usual, **how))
    worker = Worker(file, folder, size, usual, **options)
    with signals(worker, grace=GRACE):
        worker.run(run_many)
    folder.summarize()
    return worker


if __name__ == "__main__":
    SECONDS = float(sys.argv[4]) if len(sys.argv) > 4 else SECONDS
    done = work(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    print(done.counts.blocks)
