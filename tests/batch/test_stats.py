"""What is counted of a job."""

from __future__ import annotations

import json

import pytest
from batch.stub import job, outcome, work

from bagel_jax.batch.job import Defaults
from bagel_jax.batch.stats import summary, table, tally

RECORDS = [
    {"image": "part-00000/0.png", "decoded_tokens": 0, "seconds": {"load": 9.0, "compile": 0.5, "denoise": 2.0}},
    {"image": None, "text": "a", "decoded_tokens": 7, "seconds": {"load": None, "decode": 0.25}},
    {
        "images": [
            {"image": "part-00000/2-0.png", "decoded_tokens": 5, "seconds": {"denoise": 1.0, "decode": 0.5}},
            {"image": "part-00000/2-1.png", "decoded_tokens": 6, "seconds": {"denoise": 1.0}},
        ]
    },
]


def test_counts_of_parts_and_their_sum():
    """Loading is counted a thousand times; a break of a night makes a job slow; two workers at once make it so too."""
    first = tally(RECORDS)
    assert first == {
        "requests": 4,
        "images": 3,
        "decoded_tokens": 18,
        "request_seconds": {"compile": 0.5, "decode": 0.75, "denoise": 4.0},
    }
    day = 1_700_000_000.0
    night = day + 40_000
    parts = [
        {"lines": 3, "errors": {}, **first, "worked": [[day, day + 4]]},
        {"lines": 2, "errors": {"B": 1, "A": 1}, **tally([]), "worked": [[day + 1, day + 3], [night, night + 2]]},
        {"lines": 4, "errors": {"A": 1}, **tally(RECORDS), "worked": [[night + 1, night + 4]]},
    ]
    found = summary(parts)
    assert found == {
        "lines": 9,
        "ok": 6,
        "errors": {"A": 2, "B": 1},
        "parts": 3,
        "requests": 8,
        "images": 6,
        "decoded_tokens": 36,
        "began": "2023-11-14T22:13:20+00:00",
        "ended": "2023-11-15T09:20:04+00:00",
        "busy_seconds": 8.0,
        "requests_per_second": 1.0,
        "request_seconds": {"compile": 1.0, "decode": 1.5, "denoise": 8.0},
    }
    assert summary(parts[::-1]) == found
    lines = [line.split() for line in table(found).splitlines()]
    assert lines[2:4] == [["A", "2"], ["B", "1"]]


@pytest.mark.parametrize("num_images", [1, 2])
def test_a_summary_is_of_what_is_there(tmp_path, num_images):
    """Images are counted that are not there, or those of several a line are not; after a restart less is counted."""
    path, usual = job(tmp_path, 30), Defaults(num_images=num_images)
    work(path, tmp_path / "out", 7, usual)
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    images = list((tmp_path / "out").rglob("*.png"))
    texts = sum(record.get("text") is not None for record in outcome(tmp_path / "out")[0])
    assert found["images"] == len(images) == 20 * num_images
    assert found["requests"] == len(images) + texts
    assert 0 < found["busy_seconds"] < 60
    (tmp_path / "out" / "summary.json").unlink()
    work(path, tmp_path / "out", 7, usual)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == found
