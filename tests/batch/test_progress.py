"""What is told of a job while it is at work."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from batch.stub import job, run_many

from bagel_jax.batch.claims import Claims
from bagel_jax.batch.job import Defaults, Job
from bagel_jax.batch.output import JobFolder
from bagel_jax.batch.progress import Progress
from bagel_jax.batch.sources import JsonLines
from bagel_jax.batch.worker import Counts, Worker


class Told:
    """A log of a job of 1,000 lines, whose workers do as many a second as is said, by a clock of its own."""

    def __init__(self, how: str, done: float, memory=None):
        self.now, self.done, self.counts = 0.0, done, Counts()
        self.progress = Progress(how, lambda: (self.done, 1000.0), lambda: memory, lambda: self.now)

    def work(self, seconds: int, lines: float, errors: int = 0):
        """Seconds in which so many lines a second are done, half of them by this worker."""
        for _ in range(seconds):
            self.now += 1
            self.done += lines
            self.counts.done += round(lines / 2)
            self.counts.errors += errors
            self.progress(self.counts)


def test_eta_of_several_workers_after_a_resume(capsys):
    """What was done before, what others do, or minutes of loading are taken for this worker's pace."""
    told = Told("log", done=400, memory=(3 * 2**30, 2**33))
    told.now = 300  # loading
    told.work(1, lines=2, errors=1)  # a bad line, before anything is compiled
    told.now = 500
    told.work(61, lines=4)
    told.progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "3 done, 1 errors, 41% of the job, 3.0 of 8.0 GiB",
        "63 done, 1 errors, 2.00 requests/s, 53% of the job, ETA 0:01:58, 3.0 of 8.0 GiB",
        "123 done, 1 errors, 2.00 requests/s, 65% of the job, ETA 0:01:28, 3.0 of 8.0 GiB",
    ]


@pytest.mark.parametrize(("how", "shown"), [("bar", True), ("none", False), ("auto", False)])
def test_bar(how, shown, capsys):
    """A log is full of bars; or nothing is seen in a terminal; or the bar ends before the job."""
    told = Told(how, done=0)
    told.work(20, lines=50)
    told.progress.close()
    text = capsys.readouterr().err
    assert ("|" in text) == shown
    if shown:
        last = re.split(r"[\r\n]+", text.strip())[-1]
        assert last.startswith("100%|")
        assert "500 done, 0 errors, 25.00 requests/s, ETA 0:00:00" in last


def test_how_many_lines_a_job_has(tmp_path):
    """The file is read to its end before the first request; or blank lines count, or the end is a guess."""
    path = tmp_path / "job.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\n' * 10 + b'{"prompt": "b"}\n' * 5)
    source = JsonLines(path)
    assert source.count() is None
    lines = source.lines()
    next(lines)
    assert 14 <= source.count() <= 16
    assert len(list(lines)) == 14
    next(source.lines())
    assert source.count() == pytest.approx(15)


def test_lines_of_all_workers(tmp_path):
    """Blocks that others have done, or have in work, do not count."""
    path = job(tmp_path, 40)
    file, folder = Job(JsonLines(path)), JobFolder(tmp_path / "out", {})
    other = Claims(folder.claims, "elsewhere-2-b", dead_after=60)
    assert other.take(3) == 0
    (tmp_path / "out" / "part-00001.jsonl").write_text("{}\n")
    worker, seen = Worker(file, folder, 8, Defaults()), []  # lines 0 to 7, 16 to 23, 32 to 39

    def tell(counts):
        done, total = worker.lines()
        seen.append((counts.done, done, total))
        if counts.done == 24:  # the other's block, line 24 to 31, is left
            other.close()

    worker.run(run_many, tell)
    assert [done for done, _, _ in seen] == list(range(1, 33))
    assert seen[0][1] == pytest.approx(8 + 2, abs=0.01)
    assert seen[23][1] == pytest.approx(8 + 24 + 4, abs=1)
    assert seen[31][1:] == pytest.approx((40, 40), abs=1)
    assert all(after[1] >= before[1] - 4 for before, after in itertools.pairwise(seen))


def test_a_source_that_does_not_know(tmp_path):
    """Who writes a source has to count what cannot be counted."""

    class Endless:
        name, base = "endless", tmp_path

        def lines(self):
            return iter([json.dumps({"modality": "text2text", "prompt": "a"}).encode()] * 3)

    assert Job(Endless()).count() is None
