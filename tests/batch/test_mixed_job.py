"""A job of all kinds of lines, good and bad, with the demo model: the same results however it is cut and shared out."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from batch.stub import left_over, outcome
from PIL import Image
from small import random_image

from bagel_jax.batch.__main__ import main

BAD = {
    b'{"modality": "text2img", "prompt": "a"': "is no JSON",
    b'["text2img", "a"]': "is no object",
    b'{"modality": "text2text", "prompt": "\xff"}': "is not valid Unicode text",
    b'{"modality": "text2text", "prompt": "a", "stepz": 4}': "stepz",
    b'{"modality": "text2video", "prompt": "a"}': "text2video",
    b'{"modality": "text2text", "prompt": 5}': "prompt is 5; it must be a text",
    b'{"modality": "text2text"}': "was given no prompt",
    b'{"modality": "img2text", "prompt": "a", "image": "nowhere.png"}': "nowhere.png does not exist",
    b'{"modality": "img2text", "prompt": "a", "image": "broken.png"}': "cannot be read as an image",
    b'{"modality": "text2img", "prompt": "a", "steps": 0}': "steps is 0",
    b'{"modality": "text2img", "prompt": "a", "height": 50}': "height is 50",
    b'{"modality": "text2img", "prompt": "a", "steps": 2, "cfg_text_scale": 3e38, "cfg_renorm_min": 1}': "not finite",
}


def good(count: int) -> list[bytes]:
    """Lines of all modalities, with think, two sizes, and two images in any order."""
    draw, say = {"steps": 3}, {"max_tokens": 4}
    a, b = {"image": "a.png"}, {"image": "b.png"}
    kinds = [
        lambda i: {"modality": "text2img", "prompt": f"{i} red circles", "height": 64, "width": 64, **draw},
        lambda i: {"modality": "text2text", "prompt": f"What is {i}?", **say},
        lambda i: {"modality": "text2img", "prompt": f"{i} blue stars", "height": 64, "width": 48, **draw},
        lambda i: {"modality": "img2img", "prompt": f"make it {i}", "image": "a.png", **draw},
        lambda i: {"modality": "img2text", "prompt": f"What is {i}?", "images": ["b.png", "a.png"], **say},
        lambda i: {"modality": "text2img", "prompt": f"{i}", "think": True, "max_think_tokens": 4, **draw},
        lambda i: {"modality": "img2text", "inputs": [a, f"{i}", b, "What is different?"], **say},
        lambda i: {"modality": "img2img", "inputs": ["like", b, f"but {i}", a, "swap"], "seed": i, **draw},
    ]
    return [json.dumps(kinds[i % len(kinds)](i)).encode() for i in range(count)]


@pytest.mark.slow
def test_a_mixed_job(tmp_path):
    """A line has no record, or an error says nothing; or results depend on how a job is cut, or on who does what."""
    for i, name in enumerate("ab"):
        random_image(i, 64, 64 - 16 * i).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    lines = good(48)
    for i, bad in enumerate(BAD):
        lines.insert(5 * i, bad)
    (tmp_path / "job.jsonl").write_bytes(b"\n".join(lines))

    few = [
        "--dtype",
        "float32",
        "--ar-max-num-seqs",
        "2",
        "--dit-max-num-seqs",
        "2",
    ]  # at once, so that little is compiled

    def arguments(out: Path, size: int) -> list[str]:
        return [str(tmp_path / "job.jsonl"), "--output", str(out), "--shard-size", str(size), *few]

    found = {}
    for out, size in (("one", 10), ("other", 7)):
        assert main(arguments(tmp_path / out, size)) == 0
        found[out] = outcome(tmp_path / out)
    command = [sys.executable, "-m", "bagel_jax.batch", *arguments(tmp_path / "two", 4)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [worker.communicate(timeout=200)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    answered = [int(re.search(r"this worker answered (\d+)", text)[1]) for text in told]
    assert sum(answered) == len(lines)
    found["two"] = outcome(tmp_path / "two")

    records, images = found["one"]
    assert [record["line"] for record in records] == list(range(len(lines)))
    errors = {record["line"]: record["error"] for record in records if record["status"] == "error"}
    assert sorted(errors) == [i for i, line in enumerate(lines) if line in BAD]
    for i, error in errors.items():
        assert BAD[lines[i]] in error, error
        assert "\n" not in error
    assert len(images) == 30
    print(f"two workers answered {answered}")
    for name in ("other", "two"):
        same, far = compare(found["one"], found[name])
        print(f"{name}: {same} of {len(images)} images have the same bytes, the others are at most {far} apart")
        assert far <= 1
    for out in ("one", "other", "two"):
        assert left_over(tmp_path / out) == []
        with Image.open(tmp_path / out / "sheet.png") as sheet:
            assert sheet.width > 500


def compare(one, other) -> tuple[int, int]:
    """How many images have the same bytes, and how far pixels of the others are apart; texts and records are equal."""
    keep = ("id", "line", "status", "error", "text", "size", "seed", "settings", "modality", "prompt", "notes")
    for a, b in zip(one[0], other[0], strict=True):
        assert {k: a.get(k) for k in keep} == {k: b.get(k) for k in keep}
    assert one[1].keys() == other[1].keys()
    same, far = 0, 0
    for line, data in one[1].items():
        same += data == other[1][line]
        pixels = [np.asarray(Image.open(io.BytesIO(some))).astype(int) for some in (data, other[1][line])]
        far = max(far, np.abs(pixels[0] - pixels[1]).max())
    return same, int(far)
