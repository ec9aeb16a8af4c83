"""Workers that are killed, and several at once: a record a line, and nothing computed twice without need."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from batch.stub import job, left_over, outcome, start, work

from bagel_jax.batch.claims import Claims

SIZE = 6  # lines of a block


def computed(log: Path) -> dict[int, list[str]]:
    """By processes, the requests that each has computed."""
    return {int(file.name): file.read_text().split() for file in log.iterdir()}


def kill_at_random(path: Path, out: Path, kills: int, seed: int, **model) -> set[int]:
    """Kills workers of a job again and again, has others go on and end it, and returns which were killed."""
    chance, workers, killed = random.Random(seed), [], set()

    def one_more():
        workers.append(start(path, out, SIZE, model={"seconds": 0.01, **model}))

    while len(killed) < kills:
        while len(workers) < chance.randint(1, 3):
            one_more()
        time.sleep(chance.uniform(0.02, 0.2))
        victim = workers.pop(chance.randrange(len(workers)))
        victim.kill()
        victim.join()
        if victim.exitcode == -signal.SIGKILL:
            killed.add(victim.pid)
        else:  # the job was over
            assert victim.exitcode == 0
            assert len(killed) > kills / 2, "give it more lines"
            break
    one_more()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    return killed


@pytest.mark.parametrize(
    ("count", "kills"), [(100, 4), pytest.param(2400, 100, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_killed_workers(tmp_path, count, kills):
    """A line has no record, or two, or half an image, after a worker was killed; or good blocks are computed again."""
    path, log = job(tmp_path, count), tmp_path / "log"
    log.mkdir()
    work(path, tmp_path / "undisturbed", SIZE, model={"seconds": 0})
    began = time.monotonic()
    killed = kill_at_random(path, tmp_path / "out", kills, seed=count, log=log)
    print(f"{len(killed)} kills in {time.monotonic() - began:.1f} s")
    assert outcome(tmp_path / "out") == outcome(tmp_path / "undisturbed")
    assert left_over(tmp_path / "out") == []
    assert not list((tmp_path / "out").rglob("*.tmp*"))

    blocks, times = defaultdict(set), Counter()
    for process, requests in computed(log).items():
        times.update(requests)
        assert len(requests) == len(set(requests))
        for request in requests:
            blocks[request.split(":")[0]].add(process)
    died = sum(len(who) - 1 for who in blocks.values())
    print(f"{times.total() - len(times)} of {len(times)} requests again, of {died} of {len(blocks)} blocks")
    assert all(len(who - killed) <= 1 for who in blocks.values())
    # Three requests are in work at once, of two blocks at most, in which a worker may die.
    assert 0 < died <= 2 * len(killed)


def test_two_workers_share_the_blocks(tmp_path):
    """Each does everything."""
    path, log = job(tmp_path, 120), tmp_path / "log"
    log.mkdir()
    workers = [start(path, tmp_path / "out", 2, model={"log": log}) for _ in range(2)]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    requests = [request for some in computed(log).values() for request in some]
    assert len(requests) == len(set(requests))
    assert len(computed(log)) == 2
    work(path, tmp_path / "alone", 2)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "alone")


def test_who_was_a_moment_faster_keeps_a_block(tmp_path, monkeypatch):
    """A claim made between two looks at a block is taken for a dead worker's, and both compute the block."""
    first, second = (Claims(tmp_path / "claims", name, dead_after=60) for name in ("here-1-a", "there-2-b"))
    look = second._last

    def look_and_be_late(block):
        found = look(block)
        first.take(block)
        return found

    monkeypatch.setattr(second, "_last", look_and_be_late)
    assert second.take(0) is None
    assert first.mine(0)
    first.close()
    second.close()


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_worker_in_time(tmp_path, signal_number, code):
    """A machine that is taken away leaves claims for whose end the next worker waits, and half a part."""
    path = job(tmp_path, 60)
    worker = start(path, tmp_path / "out", SIZE, model={"seconds": 0.05})
    until = time.monotonic() + 60
    while not list((tmp_path / "out").glob("part-*.jsonl")):
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(worker.pid, signal_number)
    asked = time.monotonic()
    worker.join(30)
    assert worker.exitcode == code
    assert time.monotonic() - asked < 5
    assert left_over(tmp_path / "out") == []
    done = len(list((tmp_path / "out").glob("part-*.jsonl")))
    assert 0 < done < 10
    assert work(path, tmp_path / "out", SIZE).counts.blocks == 10 - done
    work(path, tmp_path / "undisturbed", SIZE)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "undisturbed")
