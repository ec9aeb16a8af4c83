"""What is written is what readers of tables take, who go by the first lines that they see."""

from __future__ import annotations

import json

import numpy as np
import pytest
from batch.stub import work

from bagel_jax.batch.job import Defaults
from bagel_jax.batch.records import uniform


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Hugging Face's `load_dataset`, without its hub and with its caches here."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    from datasets import load_dataset  # late: the first import reads the environment

    return lambda kind, files: load_dataset(kind, data_files=str(files), split="train", cache_dir=str(tmp_path / "hf"))


@pytest.mark.parametrize("num_images", [1, 2])
def test_datasets_reads_parts(tmp_path, load, num_images):
    """An error in a part that is not the first, or before any image, makes the whole job unreadable."""
    lines = [{"modality": "text2img", "prompt": f"number {i}", "metadata": {"row": i}} for i in range(8)]
    bad = {"modality": "text2img", "prompt": 5, "id": [1]}
    path, usual = tmp_path / "job.jsonl", Defaults(num_images=num_images)
    path.write_text("\n".join(map(json.dumps, [bad, *lines[:4], bad, *lines[4:], bad, bad])))
    work(path, tmp_path / "files", 4, usual)
    work(path, tmp_path / "tar", 4, usual, tar=True)
    rows = load("json", tmp_path / "files" / "part-*.jsonl")
    assert rows["line"] == list(range(12))
    assert [i for i, error in enumerate(rows["error"]) if error] == [0, 5, 10, 11]
    samples = load("webdataset", tmp_path / "tar" / "part-*.tar")
    assert [sample["json"]["metadata"]["row"] for sample in samples] == [i for i in range(8) for _ in range(num_images)]
    for sample in samples:
        expected = np.random.RandomState(sample["json"]["seed"]).randint(0, 256, (8, 8, 3))
        np.testing.assert_array_equal(sample["png"], expected)


def test_records_are_alike():
    """Seconds of a first request, which loads and compiles, are a column that others have not."""
    first = uniform({"id": "a", "seconds": {"load": 3.0, "compile": 2.0, "denoise": 1.0}})
    next_one = uniform({"id": "b", "status": "error", "error": "?", "kind": "InputError", "seconds": {"load": None}})
    assert first.keys() == next_one.keys()
    assert first["seconds"].keys() == next_one["seconds"].keys()
    assert next_one["seconds"]["load"] == 0.0
    assert (first["error"], next_one["error"]) == ("", "?")
