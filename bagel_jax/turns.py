"""The turns of a conversation from a file, for `python -m bagel_jax.run --turns FILE.jsonl`.

A line is a turn: `{"draw": PROMPT}` or `{"ask": PROMPT}`, with "image": FILE to bring in an image first, and with any
setting of a request under its name:

    {"draw": "a red circle on a white background"}
    {"draw": "make it a blue star", "cfg_text_scale": 6}
    {"ask": "What is in this image?"}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from PIL import Image

from bagel_jax.engine.session import Session
from bagel_jax.errors import InputError, json_object, read
from bagel_jax.options import APPLICABLE, Seed, settings_of, with_settings
from bagel_jax.request import ImageFile, Request, Result

Prompt = Annotated[str, Meta(min_length=1)]


class _TurnForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line: a turn of a conversation."""

    draw: Prompt | None = None
    ask: Prompt | None = None
    image: str | None = None
    seed: Seed | None = None
    think: bool | None = None
    negative_prompt: str | None = None


TurnForm = with_settings(_TurnForm)


@dataclass(frozen=True)
class Turn:
    """One turn."""

    draws: bool
    prompt: str
    image: ImageFile | None
    options: Mapping[str, Any]

    def take(self, session: Session) -> Result:
        """Takes the turn."""
        if self.image is not None:
            session.add(self.image.open())
        return (session.draw if self.draws else session.ask)(self.prompt, **self.options)


def read_turns(name: str, usual: Mapping[str, Any]) -> list[Turn]:
    """The turns in a file; `usual` are options of all turns that do not name them.

    Raises:
        InputError: a line that cannot be done, named by its number.
    """
    try:
        lines = Path(name).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--turns {name} cannot be read as text ({error}); give a file in UTF-8") from None
    turns, images = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            turn = _turn(line, usual, images)
        except InputError as error:
            raise InputError(f"--turns {name}, line {number}: {error}") from None
        turns.append(turn)
        images += turn.draws + (turn.image is not None)
    if not turns:
        raise InputError(f'--turns {name} holds no turn; it must hold one a line, as {{"draw": "a red circle"}}')
    return turns


def _turn(line: str, usual: Mapping[str, Any], images: int) -> Turn:
    form = read(json_object(line, '{"draw": "a red circle"}'), TurnForm)
    if (form.draw is None) == (form.ask is None):
        raise InputError(f'{line.strip()!r} must have either "draw" or "ask" in it')
    draws = form.draw is not None
    prompt = form.draw if draws else form.ask
    image = None if form.image is None else ImageFile.find(form.image)
    own = settings_of(form)
    own |= {name: getattr(form, name) for name in ("seed", "think", "negative_prompt")}
    own = {name: value for name, value in own.items() if value is not None}
    # What is wrong with the options shows without the images that the turn will see.
    seen = [image or Image.new("RGB", (16, 16))] if images or image is not None else []
    modality = f"{'img' if seen else 'text'}2{'img' if draws else 'text'}"
    options = {name: value for name, value in usual.items() if _concerns(name, modality)} | own
    Request.create(modality, inputs=[*seen, prompt], **options)
    return Turn(draws, prompt, image, options)


def _concerns(name: str, modality: str) -> bool:
    """Whether an option that is meant for all turns has an effect on one."""
    return name == "think" or name in APPLICABLE[modality] or (name == "negative_prompt" and modality.endswith("img"))
