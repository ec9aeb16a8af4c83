"""The contact sheet of a job: `sheet.png`, small images from all over it, each with its prompt below."""

from __future__ import annotations

import contextlib
import io
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from bagel_jax.batch.output import JobFolder
from bagel_jax.batch.records import answers, failed

_MOST = 100  # images
_COLUMNS = 10
_SIDE = 128  # of a tile, in pixels; no image is enlarged
_GAP = 16  # around tiles
_LINES, _LINE_PIXELS, _TEXT_TOP = 2, 14, 5  # below a tile
_TEXT_PIXELS = 11
_WIDE_FONTS = "NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf"  # where they are installed
_PAPER, _TILE, _INK = (255, 255, 255), (238, 238, 238), (32, 32, 32)


def write_sheet(folder: JobFolder) -> None:
    """Makes the sheet of a job that is done; none where there are no images.

    Raises:
        OSError: the folder cannot be written to any more.
    """
    tiles = list(_tiles(folder))
    if not tiles:
        return
    columns = min(_COLUMNS, len(tiles), max(2, round(len(tiles) ** 0.5)))
    rows = -(-len(tiles) // columns)
    wide, high = _SIDE + _GAP, _SIDE + _TEXT_TOP + _LINES * _LINE_PIXELS + _GAP
    sheet = Image.new("RGB", (_GAP + columns * wide, _GAP + rows * high), _PAPER)
    draw, plain, wide_font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT_PIXELS), _wide_font()
    for i, (image, prompt) in enumerate(tiles):
        left, top = _GAP + i % columns * wide, _GAP + i // columns * high
        draw.rectangle((left, top, left + _SIDE - 1, top + _SIDE - 1), fill=_TILE)
        sheet.paste(image, (left + (_SIDE - image.width) // 2, top + (_SIDE - image.height) // 2))
        font = plain if prompt.isascii() else wide_font
        for k, line in enumerate(_wrapped(prompt, font)):
            draw.text((left, top + _SIDE + _TEXT_TOP + k * _LINE_PIXELS), line, _INK, font)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    folder.write("sheet.png", file.getvalue())


def _tiles(folder: JobFolder) -> Iterator[tuple[Image.Image, str]]:
    """Images, evenly chosen over the job and made small, with their prompts."""
    counts = {number: stats["images"] for number, stats in folder.all_stats().items()}
    total, first = sum(counts.values()), 0
    count = min(total, _MOST)
    chosen = {(2 * i + 1) * total // (2 * count) for i in range(count)}
    for number, here in counts.items():
        wanted = [k - first for k in chosen.intersection(range(first, first + here))]
        first += here
        if not wanted:
            continue
        images = [one for record in folder.records(number) if not failed(record) for one in _images(record)]
        with folder.images(number) as read:
            for name, prompt in (images[k] for k in sorted(wanted) if k < len(images)):
                try:
                    image = Image.open(io.BytesIO(read(name)))
                    image.thumbnail((_SIDE, _SIDE))
                    yield image.convert("RGB"), prompt
                except Exception:  # somebody took it away, or it is damaged, which is no fault of the job
                    yield Image.new("RGB", (_SIDE, _SIDE), _PAPER), prompt


def _images(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and prompts of a record's images."""
    names = [one["image"] for one in answers(record) if one.get("image")]
    return [(name, record.get("prompt") or "") for name in names]


def _wide_font() -> ImageFont.FreeTypeFont:
    """A font of more letters than Pillow's own, which has English ones; that where there is none."""
    for name in _WIDE_FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, _TEXT_PIXELS)
    return ImageFont.load_default(_TEXT_PIXELS)


def _wrapped(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """The beginning of a text, as lines that are no wider than a tile."""
    text, lines = " ".join(text[:1000].split()), []
    while text and len(lines) < _LINES:
        fits = bisect_right(range(len(text) + 1), _SIDE, key=lambda n: font.getlength(text[:n])) - 1
        if fits == len(text):
            return [*lines, text]
        if len(lines) == _LINES - 1:
            while fits and font.getlength(text[:fits].rstrip() + "…") > _SIDE:
                fits -= 1
            return [*lines, text[:fits].rstrip() + "…"]
        at = text.rfind(" ", 0, fits + 1)
        at = at if at > 0 else max(fits, 1)
        lines.append(text[:at])
        text = text[at:].lstrip()
    return lines
