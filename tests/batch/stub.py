"""Workers whose model makes images of numbers, in processes that a test may kill."""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bagel_jax.batch.__main__ import signals
from bagel_jax.batch.job import Defaults, Job, identity
from bagel_jax.batch.output import JobFolder
from bagel_jax.batch.sources import JsonLines
from bagel_jax.batch.worker import Worker
from bagel_jax.request import Request, Result

GRACE = 5

_PROCESSES = multiprocessing.get_context("forkserver")


def job(folder: Path, count: int) -> Path:
    """A file of requests, every seventh one bad, every fifth a text."""
    lines = []
    for i in range(count):
        if i % 7 == 3:
            lines.append('{"modality": "text2text"')
        elif i % 5 == 1:
            lines.append(json.dumps({"modality": "text2text", "prompt": f"say {i}", "metadata": {"row": [i]}}))
        else:
            lines.append(json.dumps({"modality": "text2img", "prompt": f"number {i}", "id": f"picture-{i}"}))
    path = folder / "job.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def outcome(folder: Path) -> tuple[list[dict], dict[str, bytes]]:
    """Records without what clocks and parts say, and the bytes of images by the line's number."""
    records, images = [], {}
    for part in sorted(folder.glob("part-*.jsonl")):
        for line in part.read_text().splitlines():
            record = json.loads(line)
            if record.get("image"):
                part, _, name = record.pop("image").partition("/")
                if part.endswith(".tar"):
                    with tarfile.open(folder / part) as archive:
                        images[record["line"]] = archive.extractfile(name).read()
                else:
                    images[record["line"]] = (folder / part / name).read_bytes()
            records.append({k: v for k, v in record.items() if k not in ("seconds", "image")})
    return records, images


def left_over(folder: Path) -> list[str]:
    """Files that should not be there when all is done."""
    return [p.name for p in folder.iterdir() if "tmp" in p.name or p.name == "claims"]


def run_many(
    requests: Iterable[Request], *, seconds: float = 0.001, healed: bool = False, log: Path | None = None
) -> Iterator[tuple[Request, Result | Exception]]:
    """Three at once, the last and the first one by turns; a text by its prompt, an image by its seed.

    Args:
        requests: what to do.
        seconds: what one takes.
        healed: whether prompts with "fail" come out well.
        log: a folder, where a file by the process's number gets the id of each request when it is done.
    """
    work, requests, more, turn = [], iter(requests), True, itertools.cycle((-1, 0))
    while more or work:
        while more and len(work) < 3:
            one = next(requests, None)
            more = one is not None
            work += [one] * more
        if not work:
            return
        request = work.pop(next(turn))
        time.sleep(seconds)
        if log is not None:
            with (log / str(os.getpid())).open("a") as file:
                file.write(f"{request.request_id}\n")
        if "fail" in request.prompt and not healed:
            yield request, FloatingPointError("the latents are not finite")
        elif request.makes_image:
            pixels = np.random.RandomState(request.seed).randint(0, 256, (8, 8, 3)).astype(np.uint8)
            yield request, Result(request.request_id, request.modality, image=Image.fromarray(pixels))
        else:
            yield request, Result(request.request_id, request.modality, text=request.prompt.upper())


def work(
    job: Path,
    output: Path,
    size: int,
    usual: Defaults | None = None,
    *,
    tar: bool = False,
    model: dict | None = None,
    **options,
) -> Worker:
    """A worker that has ended; `model` is for `run_many`, `options` are a worker's."""
    file, usual = Job(JsonLines(job)), usual or Defaults()
    how = {"shard_size": size, "format": "webdataset" if tar else "files"}
    folder = JobFolder(output, identity(file, Path(__file__).parent, usual, **how))
    worker = Worker(file, folder, size, usual, **options)
    with signals(worker, grace=GRACE):
        worker.run(functools.partial(run_many, **model or {}))
    folder.summarize()
    return worker


def start(*args, **kwargs) -> multiprocessing.Process:
    """`work` in a process of its own."""
    return _start(work, *args, **kwargs)


def start_and_die(step: int, *args, **kwargs) -> multiprocessing.Process:
    """`work` in a process that is killed before file number `step` gets its last name."""
    return _start(_die_at, step, *args, **kwargs)


def _die_at(step: int, *args, **kwargs) -> None:
    replace, steps = Path.replace, iter(range(step))

    def counted(self, target):
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = counted
    work(*args, **kwargs)


def _start(what, *args, **kwargs) -> multiprocessing.Process:
    _warm_up()
    process = _PROCESSES.Process(target=what, args=args, kwargs=kwargs, daemon=True)
    process.start()
    return process


@functools.cache
def _warm_up() -> None:
    """New processes are copies of one that has imported everything, which takes milliseconds instead of a second."""
    _PROCESSES.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as m:  # Python 3.11's does not look where this one does
        m.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
