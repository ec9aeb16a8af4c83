"""Jobs that are no JSONL file: Parquet, and a folder of images."""

from __future__ import annotations

import io
import json
import sys
import tracemalloc

import pyarrow as pa
import pytest
from batch.stub import run_many
from PIL import Image
from pyarrow import parquet

from bagel_jax.batch.__main__ import main
from bagel_jax.batch.job import Defaults, Job, Line, identity, read_line
from bagel_jax.batch.output import JobFolder
from bagel_jax.batch.sources import open_source
from bagel_jax.batch.worker import Worker
from bagel_jax.errors import InputError


def encoded(width: int) -> bytes:
    """A PNG."""
    file = io.BytesIO()
    Image.new("RGB", (width, 2), (9, 8, 7)).save(file, "PNG")
    return file.getvalue()


def requests(source) -> list:
    """What a worker makes of a source's lines."""
    lines = map(Line, range(10**6), source.lines())
    return [read_line(line, source.base, Defaults()) for line in lines]


def test_rows_are_lines(tmp_path):
    """A column counts for nothing: nulls, what pandas makes of whole numbers, nested ones, or an image in the file."""
    (tmp_path / "a.png").write_bytes(encoded(3))
    rows = [
        {"modality": "text2img", "prompt": "a", "steps": 4.0, "id": "x", "metadata": {"row": 1, "of": None}},
        {"modality": "img2text", "prompt": "b", "image": {"bytes": encoded(5), "path": "gone.png"}},
        {"modality": "img2text", "prompt": "c", "image": {"bytes": None, "path": "a.png"}, "max_tokens": 7},
        {"modality": "img2text", "inputs": [{"text": "d"}, {"image": encoded(6)}, {"text": "e"}]},
        {
            "modality": "img2img",
            "prompt": "f",
            "images": [{"bytes": encoded(7)}, {"path": "a.png"}],
            "cfg_interval": [0, 1],
        },
        {"modality": "text2img"},
    ]
    parquet.write_table(pa.Table.from_pylist(rows, schema=_schema()), tmp_path / "job.parquet")
    found = requests(open_source(str(tmp_path / "job.parquet")))
    inputs = [[getattr(item, "size", item) for item in some[0].inputs] for _, some in found[:5]]
    assert inputs == [["a"], [(5, 2), "b"], [(3, 2), "c"], ["d", (6, 2), "e"], [(7, 2), (3, 2), "f"]]
    assert found[0][1][0].settings.steps == 4
    assert found[2][1][0].settings.max_tokens == 7
    assert found[0][0]["metadata"] == {"row": 1, "of": None}
    assert found[0][0]["id"] == "x"
    assert found[1][1][0].inputs[0].open().getpixel((4, 1)) == (9, 8, 7)
    assert str(found[5][1]) == "text2img was given no prompt; it needs one"


def _schema() -> pa.Schema:
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    fields = {name: pa.string() for name in ("modality", "prompt", "id")}
    fields |= {"steps": pa.float64(), "max_tokens": pa.int32(), "cfg_interval": pa.list_(pa.float32())}
    fields |= {"image": image, "images": pa.list_(image), "metadata": pa.struct({"row": pa.int64(), "of": pa.string()})}
    return pa.schema(fields | {"inputs": pa.list_(pa.struct({"text": pa.string(), "image": pa.binary()}))})


def test_a_column_of_paths_and_texts(tmp_path):
    """The plainest table of all is read otherwise than the same lines as JSON."""
    (tmp_path / "a.png").write_bytes(encoded(3))
    table = pa.table({"modality": ["img2img"] * 2, "prompt": ["a", "b"], "image": ["a.png"] * 2, "seed": [1, None]})
    parquet.write_table(table, tmp_path / "job.parquet")
    (tmp_path / "job.jsonl").write_text("\n".join(json.dumps(_without_nulls(row)) for row in table.to_pylist()))
    (said, rows), (said_too, lines) = (
        zip(*requests(open_source(str(tmp_path / name))), strict=True) for name in ("job.parquet", "job.jsonl")
    )
    assert said == said_too
    assert [[one.inputs for one in some] for some in rows] == [[one.inputs for one in some] for some in lines]


def _without_nulls(row: dict) -> dict:
    return {name: value for name, value in row.items() if value is not None}


def test_a_long_table_is_read_as_far_as_needed(tmp_path):
    """All images of a table lie in memory before the first request."""
    path = tmp_path / "job.parquet"
    schema = pa.schema({"modality": pa.string(), "prompt": pa.string(), "image": pa.binary()})
    with parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        rows = [{"modality": "img2text", "prompt": "a", "image": bytes(2**17)}] * 16
        for _ in range(16):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    source = open_source(str(path))
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    most = max(pa.total_allocated_bytes() - before for _ in source.lines())
    most += tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < path.stat().st_size / 2
    assert source.fingerprint()["bytes"] == path.stat().st_size


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"prompt": ["a"], "label": [1]},
            " has a column label; it may have modality, prompt, image, images, inputs, seed,",
        ),
        ({"prompt": pa.array([], pa.string())}, " has no row; it must have one a request"),
        (b"PAR1 no more", " cannot be read as Parquet (Parquet magic bytes not found"),
        (None, " cannot be read (No such file or directory); give a file of requests"),
    ],
)
def test_tables_that_are_refused(tmp_path, table, message):
    """It is found at the last row, or after a model of 29 GB was read, with pyarrow's own words."""
    path = tmp_path / "job.parquet"
    if isinstance(table, dict):
        parquet.write_table(pa.table(table), path)
    elif table is not None:
        path.write_bytes(table)
    with pytest.raises(InputError) as error:
        open_source(str(path))
    assert str(error.value).startswith(f"the job {path}{message}")


def test_a_table_damaged_in_the_middle(tmp_path):
    """The worker ends with pyarrow's traceback instead of a sentence."""
    path = tmp_path / "job.parquet"
    parquet.write_table(pa.table({"prompt": [str(i) * 50 for i in range(1000)]}), path)
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        list(open_source(str(path)).lines())


def test_without_pyarrow(tmp_path, monkeypatch):
    """Nobody says what is missing."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs pyarrow, which is not installed; run pip install -e '\.\[parquet\]'"):
        open_source(str(tmp_path / "job.parquet"))


@pytest.fixture
def photos(tmp_path):
    """A folder of three images and other things."""
    folder = tmp_path / "photos"
    for name in ("b.png", "a/é 1.JPG", "a/z.v2.webp", "a/notes.txt", ".hidden.png", ".cache/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name, "PNG")
    (folder / "a" / "up").symlink_to(folder, target_is_directory=True)
    return folder


def test_a_line_an_image_and_prompt(photos):
    """An image is left out, comes twice, or the order is the file system's."""
    source = open_source(str(photos), "img2text", ["What?", "Why?"])
    found = requests(source)
    said = [(said["id"], said["prompt"], said["metadata"]["image"], said["seed"]) for said, _ in found]
    assert said == [
        *(("a-z_v2-0", "What?", "a/z.v2.webp", 0), ("a-z_v2-1", "Why?", "a/z.v2.webp", 1)),
        *(("a-é_1-0", "What?", "a/é 1.JPG", 2), ("a-é_1-1", "Why?", "a/é 1.JPG", 3)),
        *(("b-0", "What?", "b.png", 4), ("b-1", "Why?", "b.png", 5)),
    ]
    assert all(request.modality == "img2text" and len(request.inputs) == 2 for _, (request,) in found)
    one = [said["id"] for said, _ in requests(open_source(str(photos), "img2img", ["a"]))]
    assert one == ["a-z_v2", "a-é_1", "b"]


@pytest.mark.parametrize("change", ["size", "name", "prompts"])
def test_a_folder_is_another_job(photos, change):
    """Answers to other images, or other questions, stand beside each other in one folder."""
    before = open_source(str(photos), "img2text", ["a"]).fingerprint()
    assert open_source(str(photos), "img2text", ["a"]).fingerprint() == before
    if change == "size":
        (photos / "b.png").write_bytes(encoded(9) + b"more")
    elif change == "name":
        (photos / "b.png").rename(photos / "c.png")
    assert open_source(str(photos), "img2text", ["b" if change == "prompts" else "a"]).fingerprint() != before


def test_a_folder_of_images_is_answered(photos, tmp_path):
    """Image files are not called as the images that they come from."""
    job, usual = Job(open_source(str(photos), "img2img", ["a"])), Defaults()
    folder = JobFolder(tmp_path / "out", identity(job, photos, usual))
    Worker(job, folder, 10, usual).run(run_many)
    names = sorted(file.name for file in (tmp_path / "out" / "part-00000").iterdir())
    assert names == ["a-z_v2.png", "b.png", "line-1.png"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["photos"], "the job photos is a folder and there are no --prompts; say what to do with its images"),
        (["photos", "--prompts", "a"], "--modality is None; it must be img2img or img2text for a folder of images"),
        (
            ["photos", "--prompts", "a", "--modality", "text2img"],
            "--modality is text2img; it must be img2img or img2text",
        ),
        (
            ["empty", "--prompts", "a", "--modality", "img2img"],
            "the job empty has no image in it; it must have some (.avif",
        ),
        (
            ["a.jsonl", "--prompts", "a"],
            "--prompts was given for a.jsonl, whose lines have their own; it is for a folder",
        ),
        (
            ["photos", "--prompts", "a", "--modality", "img2img", "--output", "photos/out"],
            "--output photos/out lies in photos, whose images are the job; give another folder",
        ),
    ],
)
def test_bad_command_lines(photos, args, message, monkeypatch, capsys):
    """A job of the wrong kind starts, or reads what it writes."""
    monkeypatch.chdir(photos.parent)
    (photos.parent / "empty").mkdir()
    (photos.parent / "a.jsonl").write_text("{}")
    assert main(["--output", "out", *args]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
