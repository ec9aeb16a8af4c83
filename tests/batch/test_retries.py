"""`--retry-errors`: lines that are errors are computed anew, and nothing else, whoever dies."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from batch.stub import left_over, outcome, start, start_and_die, work
from PIL import Image

from bagel_jax.batch.job import Defaults

SIZE = 5
TAR = pytest.mark.parametrize("tar", [False, True], ids=["files", "tar"])
HEALED = {"healed": True}


def job(folder: Path, count: int = 20) -> Path:
    """A file in which lines 3 to 6 and 8 fail, until the model is healed and `photo.png` is there; ids say little."""
    lines = [json.dumps({"modality": "text2img", "prompt": f"number {i}", "id": "ab"[i % 2]}) for i in range(count)]
    lines[3] = json.dumps({"modality": "text2img", "prompt": "fail", "id": "a"})
    lines[4] = json.dumps({"modality": "text2text", "prompt": "fail"})
    lines[5] = json.dumps({"modality": "img2img", "prompt": "b", "image": "photo.png", "id": "b"})
    lines[6] = json.dumps({"modality": "img2text", "prompt": "c", "image": "photo.png"})
    lines[8] = json.dumps({"modality": "text2img", "prompt": "fail too"})
    path = folder / "job.jsonl"
    path.write_text("\n".join(lines))
    return path


def heal(folder: Path) -> None:
    """The image that was missing."""
    Image.new("RGB", (8, 8)).save(folder / "photo.png")


def files(folder: Path) -> dict[str, Any]:
    """All that a job leaves, without what clocks say."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for name in found:
        if name.endswith(("stats.json", "summary.json")):
            found[name] = {k: v for k, v in json.loads(found[name]).items() if k not in _CLOCKS}
    return found


_CLOCKS = "worked", "retries", "began", "ended", "busy_seconds", "requests_per_second"


@TAR
@pytest.mark.parametrize("num_images", [1, 3])
def test_errors_are_computed_anew_and_nothing_else(tmp_path, tar, num_images):
    """All is computed again; or what comes of it differs from a job without errors; or good images are gone."""
    path, out, usual = job(tmp_path), tmp_path / "out", Defaults(num_images=num_images)
    work(path, out, SIZE, usual, tar=tar)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
    assert {record["line"] for record in outcome(out)[0] if record["status"] == "error"} == {3, 4, 5, 6, 8}

    heal(tmp_path)
    images = 3 * num_images
    assert work(path, out, SIZE, usual, tar=tar, model=HEALED, retry_errors=True).counts.done == images + 2
    work(path, tmp_path / "undisturbed", SIZE, usual, tar=tar, model=HEALED)
    assert files(out) == files(tmp_path / "undisturbed")
    assert before.items() <= {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}.items()
    assert json.loads((out / "part-00000.stats.json").read_text())["retries"] == 1

    written = {p: p.stat().st_mtime_ns for p in out.glob("part-*")}
    assert work(path, out, SIZE, usual, tar=tar, model=HEALED, retry_errors=True).counts.done == 0
    assert written == {p: p.stat().st_mtime_ns for p in out.glob("part-*")}


def test_what_fails_again_is_tried_once_a_run(tmp_path):
    """A line that cannot be answered keeps workers busy for ever; without the flag, or before the job is done, too."""
    path, out = job(tmp_path), tmp_path / "out"
    assert work(path, out, SIZE, retry_errors=True).counts.done == 20
    assert work(path, out, SIZE).counts.done == 0
    heal(tmp_path)
    again = work(path, out, SIZE, retry_errors=True)
    assert (again.counts.done, again.counts.errors) == (5, 3)
    again = work(path, out, SIZE, retry_errors=True)
    assert (again.counts.done, again.counts.errors) == (3, 3)
    assert json.loads((out / "summary.json").read_text())["errors"] == {"FloatingPointError": 3}
    assert json.loads((out / "part-00000.stats.json").read_text())["retries"] == 2


def test_several_workers_share_what_is_tried_again(tmp_path):
    """Each computes all errors; or one for whom the job is done takes the others' claims away."""
    path, out, log = job(tmp_path), tmp_path / "out", tmp_path / "log"
    path.write_text("\n".join(json.dumps({"modality": "text2text", "prompt": f"fail {i}"}) for i in range(60)))
    work(path, out, SIZE, model={"seconds": 0})
    log.mkdir()
    workers = [
        start(path, out, SIZE, model={"log": log, "seconds": 0.01, **HEALED}, retry_errors=True) for _ in range(3)
    ]
    while any(worker.is_alive() for worker in workers):
        work(path, out, SIZE)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    requests = [request for file in log.iterdir() for request in file.read_text().split()]
    assert len(requests) == len(set(requests)) == 60
    assert len(list(log.iterdir())) > 1
    assert all(record["status"] == "ok" for record in outcome(out)[0])
    assert left_over(out) == []


@TAR
def test_killed_at_any_step(tmp_path, tar):
    """A part has neither its old results nor the new ones, or an image is gone."""
    path, out = job(tmp_path), tmp_path / "out"
    work(path, tmp_path / "old", SIZE, tar=tar)
    heal(tmp_path)
    work(path, tmp_path / "new", SIZE, tar=tar, model=HEALED)
    old, new = (outcome(tmp_path / name) for name in ("old", "new"))
    states = [dict(enumerate(records)) for records, _ in (old, new)]
    for step in itertools.count():
        shutil.copytree(tmp_path / "old", out)
        dead = start_and_die(step, path, out, SIZE, tar=tar, model=HEALED, retry_errors=True)
        dead.join(30)
        records, images = outcome(out)
        assert len(records) == len(new[0])
        assert all(record in (state[i] for state in states) for i, record in enumerate(records))
        assert old[1].items() <= images.items() <= new[1].items()
        work(path, out, SIZE, tar=tar, model=HEALED, retry_errors=True)
        assert files(out) == files(tmp_path / "new")
        assert left_over(out) == []
        if dead.exitcode == 0:
            break
        assert dead.exitcode == -signal.SIGKILL
        shutil.rmtree(out)
    assert step > 6
