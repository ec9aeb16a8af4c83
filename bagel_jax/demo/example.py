"""Where the demo model lies, and an example of each modality for it: what runs when nothing else is asked for.

Imports nothing of weight, so that the command line can look here before it knows whether its arguments are good.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

MODEL = Path(__file__).parent / "model"  # in the published layout

_RED_CIRCLE = Path(__file__).parent / "examples" / "red_circle.png"


class Example(NamedTuple):
    """A prompt, and the image it is about where the modality takes one."""

    prompt: str
    image: Path | None = None


EXAMPLES: Mapping[str, Example] = {
    "text2img": Example("a red circle on a white background"),
    "img2img": Example("make it blue", _RED_CIRCLE),
    "img2text": Example("What is in this image?", _RED_CIRCLE),
    "text2text": Example("What is the capital of France?"),
}
