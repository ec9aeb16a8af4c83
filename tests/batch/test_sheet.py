"""The contact sheet of a job."""

from __future__ import annotations

import json

import numpy as np
import pytest
from batch.stub import work
from PIL import Image

from bagel_jax.batch import sheet
from bagel_jax.batch.job import Defaults
from bagel_jax.batch.output import JobFolder

SIZE = 8  # of a stub's image


def made(folder, prompts, *, num_images=1, tar=False) -> np.ndarray:
    """The sheet of a job of these prompts, whose pixels are of their numbers."""
    lines = (json.dumps({"modality": "text2img", "prompt": prompt}) for prompt in prompts)
    (folder / "job.jsonl").write_text("\n".join(lines))
    work(folder / "job.jsonl", folder / "out", 30, Defaults(num_images=num_images), tar=tar, model={"seconds": 0})
    job = json.loads((folder / "out" / "job.json").read_text())
    sheet.write_sheet(JobFolder(folder / "out", job))
    with Image.open(folder / "out" / "sheet.png") as image:
        return np.asarray(image)


def seeds(pixels: np.ndarray, count: int) -> list[int]:
    """Which seeds' images are on a sheet."""
    whole = {
        np.random.RandomState(seed).randint(0, 256, (SIZE, SIZE, 3)).astype(np.uint8).tobytes(): seed
        for seed in range(count)
    }
    wide, high = sheet._SIDE + sheet._GAP, sheet._SIDE + sheet._TEXT_TOP + 2 * sheet._LINE_PIXELS + sheet._GAP
    first, found = sheet._GAP + (sheet._SIDE - SIZE) // 2, []
    for top in range(first, pixels.shape[0], high):
        tiles = (pixels[top : top + SIZE, left : left + SIZE] for left in range(first, pixels.shape[1], wide))
        found += [seed for tile in tiles if (seed := whole.get(tile.tobytes())) is not None]
    return found


@pytest.mark.parametrize("tar", [False, True], ids=["files", "tar"])
def test_images_of_all_the_job(tmp_path, tar):
    """Only the beginning is shown, or an image twice; lines that failed leave holes, or shift prompts."""
    prompts = ["fail" if i % 10 == 0 else f"number {i}" for i in range(130)]
    found = seeds(made(tmp_path, prompts, num_images=2, tar=tar), 260)
    assert len(found) == 100
    assert found == sorted(set(found))
    assert found[0] < 5
    assert found[-1] > 255
    assert max(np.diff(found)) <= 5  # every 2.34th, and two of a line that failed
    assert not any(seed % 20 in (0, 1) for seed in found)


def test_few_images_and_one_that_is_gone(tmp_path):
    """A sheet of three images is as wide as one of a hundred; an image that was taken away ends the job."""
    pixels = made(tmp_path, ["a", "b", "c"])
    assert seeds(pixels, 3) == [0, 1, 2]
    assert pixels.shape[1] < 400
    (tmp_path / "out" / "part-00000" / "1.png").unlink()
    assert seeds(made(tmp_path, ["a", "b", "c"]), 3) == [0, 2]


def test_no_images_no_sheet(tmp_path):
    """A job of texts ends with a division by zero."""
    path = tmp_path / "job.jsonl"
    path.write_text('{"modality": "text2text", "prompt": "a"}')
    work(path, tmp_path / "out", 5)
    sheet.write_sheet(JobFolder(tmp_path / "out", json.loads((tmp_path / "out" / "job.json").read_text())))
    assert not (tmp_path / "out" / "sheet.png").exists()


@pytest.mark.parametrize("fonts", [sheet._WIDE_FONTS, ()], ids=["installed", "own"])
@pytest.mark.parametrize(
    "prompt",
    ["", "a", "one two three " * 90, "w" * 5000, "漢字" * 40, "\u202eabc\u0000\u0007\n\n\tx", "👩‍👩‍👧 e\u0301 ﷽" * 9],
)
def test_prompts_are_cut_to_fit(prompt, fonts, monkeypatch):
    """A long prompt runs over the next image, a word without end hangs, and what the font lacks ends the job."""
    monkeypatch.setattr(sheet, "_WIDE_FONTS", fonts)
    font = sheet._wide_font()
    lines = sheet._wrapped(prompt, font)
    assert len(lines) <= 2
    assert all(font.getlength(line) <= sheet._SIDE for line in lines)
    kept = "".join(lines).replace(" ", "")
    assert "".join(prompt.split()).startswith(kept.removesuffix("…"))
    assert kept.endswith("…") or kept == "".join(prompt.split())
