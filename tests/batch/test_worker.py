"""Workers on one job: every line has one record, whoever dies, and the same one."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import webdataset
from batch.stub import job, left_over, outcome, work
from commands import process
from PIL import Image

from bagel_jax.batch import worker as worker_module
from bagel_jax.batch.__main__ import main
from bagel_jax.batch.claims import Claims
from bagel_jax.batch.job import Defaults, Job, identity
from bagel_jax.batch.output import JobFolder, Part
from bagel_jax.batch.sources import JsonLines
from bagel_jax.errors import InputError

TESTS = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
STUB = Path(__file__).with_name("stub.py")
EMPTY = Path(os.devnull)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_record_a_line_whatever_the_size_of_parts(tmp_path, size):
    """Parts cut a job otherwise, and results change: seeds are counted by part, or the last part is lost."""
    path = job(tmp_path, 40)
    work(path, tmp_path / "whole", 40)
    work(path, tmp_path / "cut", size)
    records, images = outcome(tmp_path / "cut")
    assert (records, images) == outcome(tmp_path / "whole")
    assert [record["line"] for record in records] == list(range(40))
    assert {record["line"] for record in records if record["status"] == "error"} == {i for i in range(40) if i % 7 == 3}
    assert records[1]["metadata"] == {"row": [1]}
    assert records[0]["id"] == "picture-0"
    assert records[1]["id"] == "1"
    assert [record["seed"] for record in records if record["seed"] is not None] == [i for i in range(40) if i % 7 != 3]
    assert left_over(tmp_path / "cut") == []
    summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
    counts = {"lines": 40, "ok": 34, "errors": {"InputError": 6}, "parts": -(-40 // size), "requests": 34}
    assert counts.items() <= summary.items()


def test_ids_that_are_no_file_names(tmp_path):
    """An id writes outside of the folder, or over another line's image."""
    ids = ["../../evil", "a", "A", "a", "", ".hidden", "x" * 300, "line-2", "ö/\u0000"]
    lines = [json.dumps({"modality": "text2img", "prompt": "a", "id": name}) for name in ids]
    path = tmp_path / "job.jsonl"
    path.write_text("\n".join(lines))
    work(path, tmp_path / "out", 100)
    records, images = outcome(tmp_path / "out")
    assert [record["id"] for record in records] == ids
    assert sorted(images) == list(range(len(ids)))
    assert len(list((tmp_path / "out" / "part-00000").iterdir())) == len(ids)
    assert {p.name for p in tmp_path.iterdir()} == {"job.jsonl", "out"}


def test_a_finished_job_is_not_done_again(tmp_path):
    """The same command once more computes everything anew."""
    path = job(tmp_path, 20)
    assert work(path, tmp_path / "out", 4).counts.blocks == 5
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.png")}
    assert work(path, tmp_path / "out", 4).counts.done == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.png")}


def test_a_full_disk_ends_the_worker(tmp_path, monkeypatch):
    """Every line after that is an error, and the job is called done."""
    path = job(tmp_path, 20)
    saved, save = [], Part.save

    def full(self, i, k, result):
        saved.append(i)
        if len(saved) > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, i, k, result)

    with monkeypatch.context() as m:
        m.setattr(Part, "save", full)
        with pytest.raises(OSError, match="No space left"):
            work(path, tmp_path / "out", 4)
    assert left_over(tmp_path / "out") == []
    assert work(path, tmp_path / "out", 4).counts.blocks < 5
    work(path, tmp_path / "undisturbed", 4)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "undisturbed")


def test_a_slow_worker_keeps_its_results_to_itself(tmp_path):
    """Who was taken for dead wakes up and publishes half of what is there already."""
    claims = Claims(tmp_path / "claims", "host-1-a", dead_after=0.0)
    other = Claims(tmp_path / "claims", "elsewhere-2-b", dead_after=0.0)
    assert claims.take(0) == 0
    assert other.take(0) is None  # it was seen for the first time
    assert claims.mine(0)
    os.utime(tmp_path / "claims" / "00000.0")
    assert other.take(0) is None  # it lives
    assert other.take(0) == 1
    assert not claims.mine(0)
    claims.release(0)
    assert other.mine(0)
    other.close()
    claims.close()
    assert not (tmp_path / "claims").exists()


@pytest.mark.parametrize("change", ["input", "settings", "shard_size", "model", "version"])
def test_another_job_in_the_folder_is_refused(tmp_path, change):
    """Parts of two jobs stand beside each other as if they were one."""
    path = job(tmp_path, 5)
    usual = {"input": path, "settings": {}, "shard_size": 2, "model": TESTS / "batch", "version": "1"}
    other = tmp_path / "other.jsonl"
    other.write_text("{}")
    changed = {"input": other, "settings": {"steps": 4}, "shard_size": 3, "model": TESTS / "train", "version": "2"}

    def open_folder(**what):
        file = Job(JsonLines(what["input"]))
        more = {name: what[name] for name in ("shard_size", "version")}
        return JobFolder(tmp_path / "out", identity(file, what["model"], Defaults(what["settings"]), **more))

    open_folder(**usual)
    open_folder(**usual)
    with pytest.raises(InputError, match=rf"is of another job \({change} differs"):
        open_folder(**usual | {change: changed[change]})


def test_a_long_file_is_read_as_far_as_needed(tmp_path):
    """Ten million lines are read, and kept, before the first request."""
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(b'{"modality": "text2text", "prompt": "a"}\n' * 10)
        file.truncate(2**40)  # a hole of a terabyte
    made = Job(JsonLines(path))
    assert len(next(made.blocks(5)).lines) == 5
    assert made.source.fingerprint()["bytes"] == 2**40


def run(*args) -> subprocess.CompletedProcess:
    """The command line."""
    return process("-m", "bagel_jax.batch", *args)


def test_command(tmp_path, capsys):
    """The command line as a person has it: a job, the same again, another one in its folder."""
    path, out = tmp_path / "job.jsonl", tmp_path / "out"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b", "metadata": 1}\n{"prompt": 5}\n')
    args = path, "--output", out, "--modality", "text2text", "--max-tokens", 3, "--shard-size", 2
    done = run(*args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        f"3 lines in 2 parts, 1 of them errors, see {out}; this worker answered 3 requests in "
    )
    records = [json.loads(line) for part in sorted(out.glob("*.jsonl")) for line in part.read_text().splitlines()]
    assert [record["status"] for record in records] == ["ok", "ok", "error"]
    assert all(record["settings"]["max_tokens"] == 3 for record in records[:2])
    assert records[2]["error"] == "prompt is 5; it must be a text"
    assert [line.split() for line in done.stdout.splitlines()[1:4]] == [
        ["lines", "3"],
        ["ok", "2"],
        ["InputError", "1"],
    ]
    assert main([*map(str, args), "--strict"]) == 3
    assert "this worker answered 0 requests" in capsys.readouterr().out
    assert main([*map(str, args), "--dtype", "bfloat16"]) == 2
    assert "is of another job (dtype differs" in capsys.readouterr().err
    assert main([*map(str, args), "--seed", "1"]) == 2
    assert capsys.readouterr().err == (
        f"error: --output {out} is of another job (settings differs, see job.json there); give another folder\n"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["nowhere.jsonl"],
            "the job nowhere.jsonl cannot be read (No such file or directory); give a file of requests",
        ),
        ([TESTS], f"the job {TESTS} is a folder and there are no --prompts; say what to do with its images"),
        ([EMPTY], f"the job {EMPTY} holds no request; it must hold one a line, as JSON"),
        ([STUB, "--steps", "1"], "steps is 1; it must be a whole number, from 2 to 1000"),
        ([STUB, "--shard-size", "0"], "shard_size is 0; it must be a number, at least 1"),
    ],
)
def test_bad_input(tmp_path, args, message, capsys):
    """It is found after a model of 29 GB was read."""
    assert main([*map(str, args), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "out").exists()


def test_half_a_letter(tmp_path):
    """A line with an emoji that was cut in two ends every worker that comes to it."""
    path = tmp_path / "job.jsonl"
    path.write_text('{"modality": "text2text", "prompt": "é", "metadata": "\\ud83d", "id": "\\ud83d"}')
    work(path, tmp_path / "out", 1)
    (record,), _ = outcome(tmp_path / "out")
    assert (record["metadata"], record["text"]) == ("\ud83d", "É")


def test_several_images_a_line(tmp_path):
    """They have one seed, or share a file."""
    lines = [
        {"modality": "text2img", "prompt": "a", "id": "x"},
        {"modality": "text2img", "prompt": "b", "id": "x-0", "seed": 2**32 - 1},
        {"modality": "text2text", "prompt": "c"},
        {"modality": "text2img", "prompt": "d", "steps": 0},
    ]
    path = tmp_path / "job.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    work(path, tmp_path / "out", 10, Defaults(seed=5, num_images=3))
    records = list(map(json.loads, (tmp_path / "out" / "part-00000.jsonl").read_text().splitlines()))
    assert [[one["seed"] for one in record.get("images", [])] for record in records] == [
        [5, 6, 7],
        [2**32 - 1, 0, 1],
        [],
        [],
    ]
    assert [one["image"] for one in records[0]["images"]] == [f"part-00000/x-{k}.png" for k in range(3)]
    assert [record["status"] for record in records] == ["ok", "ok", "ok", "error"]
    assert records[2]["text"] == "C"
    for record in records[:2]:
        for one in record["images"]:
            expected = np.random.RandomState(one["seed"]).randint(0, 256, (8, 8, 3))
            np.testing.assert_array_equal(Image.open(tmp_path / "out" / one["image"]), expected)


def test_webdataset_reads_what_is_written(tmp_path):
    """Images and records go apart, at a dot in a name, or in the reader's order."""
    path = tmp_path / "job.jsonl"
    lines = [{"modality": "text2img", "prompt": "a", "id": "a.b", "metadata": {"row": 1}}, {"prompt": "b"}]
    lines += [{"modality": "text2img", "prompt": f"number {i}"} for i in range(2, 5)]
    path.write_text("\n".join(map(json.dumps, lines)))
    work(path, tmp_path / "out", 3, Defaults(num_images=2), tar=True)
    parts = sorted((tmp_path / "out").glob("part-*.tar"))
    samples = [s for part in parts for s in webdataset.WebDataset(str(part), shardshuffle=False).decode("pil")]
    assert [sample["__key__"] for sample in samples] == [
        *("line-0-0", "line-0-1"),  # line 1 is an error, which is no sample
        *("2-0", "2-1", "3-0", "3-1", "4-0", "4-1"),
    ]
    assert samples[0]["json"]["metadata"] == {"row": 1}
    assert all("images" not in sample["json"] for sample in samples)
    for sample in samples:
        expected = np.random.RandomState(sample["json"]["seed"]).randint(0, 256, (8, 8, 3))
        np.testing.assert_array_equal(sample["png"], expected)
    assert left_over(tmp_path / "out") == []
    assert not list((tmp_path / "out").glob("part-*/"))


def test_what_members_of_a_tar_file_do_not_say(tmp_path):
    """Workers at different times, or of different users, write different bytes."""
    path = tmp_path / "job.jsonl"
    path.write_text('{"modality": "text2img", "prompt": "a"}')
    work(path, tmp_path / "out", 3, tar=True)
    with tarfile.open(tmp_path / "out" / "part-00000.tar") as archive:
        assert [member.name for member in archive] == ["0.json", "0.png"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in archive} == {(0, 0, 0, "", "")}


def test_what_a_worker_left_that_died_at_the_end(tmp_path):
    """Killed while it wrote the summary, or which job this is, it leaves a file that nobody removes."""
    path = job(tmp_path, 5)
    work(path, tmp_path / "out", 2)
    (tmp_path / "out" / "claims").mkdir()
    for name in ("summary.json.7.tmp", "job.json.7.tmp", "claims/00001.0"):
        (tmp_path / "out" / name).write_text("{")
    work(path, tmp_path / "out", 2)
    assert left_over(tmp_path / "out") == []


def test_a_file_is_not_read_again_and_again_while_others_work(tmp_path, monkeypatch):
    """Who waits reads millions of lines every second; or for ever, once the other let go of the last claim."""
    path = job(tmp_path, 20)
    (tmp_path / "out").mkdir()
    other = Claims(tmp_path / "out" / "claims", "elsewhere-2-b", dead_after=60)
    assert other.take(1) == 0
    read, blocks = [], Job.blocks
    monkeypatch.setattr(Job, "blocks", lambda self, size: read.append(size) or blocks(self, size))
    monkeypatch.setattr(worker_module, "_LOOK_SECONDS", 0.05)
    timer = threading.Timer(2.0, other.close)
    timer.start()
    work(path, tmp_path / "out", 5)
    timer.join()
    assert len(read) <= 4  # is there a request, is anything left, the first round, and the one for what was let go
    assert len(outcome(tmp_path / "out")[0]) == 20
