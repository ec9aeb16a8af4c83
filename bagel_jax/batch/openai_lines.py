"""A line of OpenAI's batch files, and what it asks of a BAGEL model; `openai_answers.py` is the way back.

    {"custom_id": "7", "method": "POST", "url": "/v1/images/generations", "body": {"prompt": "a red bench"}}

What a body may hold is in the types below. A field with no meaning for BAGEL is refused where it would change the
answer, and otherwise taken.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from bagel_jax.errors import InputError, checked, field_types, read
from bagel_jax.options import Seed, settings_of, with_settings

MAX_N = 128  # answers to a line

# What a field may say that would otherwise ask for what is not here.
_No = Annotated[Literal[False], Meta(extra={"is": "false, or left out"})] | None
_Zero = Annotated[float, Meta(ge=0, le=0, extra={"is": "0, or left out"})] | None
_Auto = Meta(extra={"is": "auto, or left out"})
_Object = Annotated[Mapping, Meta(extra={"is": "an object"})]


class _Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all bodies may hold: `n`, fields of our own requests, and what changes nothing."""

    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    seed: Seed | None = None
    think: bool | None = None
    negative_prompt: str | None = None
    stream: _No = None
    model: str | None = None
    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None


class _ImageBody(_Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is asked of `/v1/images/generations`."""

    prompt: str
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    quality: Annotated[Literal["auto", "standard"], _Auto] | None = None
    background: Annotated[Literal["auto", "opaque"], _Auto] | None = None
    output_format: Annotated[Literal["png"], Meta(extra={"is": "png, or left out"})] | None = None
    partial_images: _Zero = None
    output_compression: Any = None  # of a PNG nothing is lost
    moderation: Any = None


class _EditBody(_ImageBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is asked of `/v1/images/edits`; in batch files images stand in the JSON."""

    image: Any = None
    images: Any = None


class _ChatBody(_Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is asked of `/v1/chat/completions`."""

    messages: Annotated[tuple[_Object, ...], Meta(min_length=1)]
    max_completion_tokens: int | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    frequency_penalty: _Zero = None
    presence_penalty: _Zero = None
    logprobs: _No = None
    response_format: _Object | None = None
    modalities: tuple[Annotated[Literal["text"], Meta(extra={"is": "text"})], ...] | None = None
    parallel_tool_calls: Any = None  # of no tools
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None


class _Message(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: Any
    name: Any = None


class _Text(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    text: str


class _ImageURL(msgspec.Struct, frozen=True, kw_only=True):
    url: str
    # A model sees an image as large as it can, at no choice.
    detail: Annotated[Literal["auto", "high", "original"], _Auto] | None = None


class _Image(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    image_url: _ImageURL


_BODIES = {
    "/v1/chat/completions": with_settings(_ChatBody),
    "/v1/images/generations": with_settings(_ImageBody),
    "/v1/images/edits": with_settings(_EditBody),
}
CHAT, GENERATIONS, EDITS = _BODIES


def is_openai(line: Mapping[str, Any]) -> bool:
    """Whether a line is in OpenAI's form, right or wrong."""
    return "custom_id" in line or ("url" in line and "body" in line)


def heading(line: Mapping[str, Any], number: int, text: bytes) -> dict[str, Any]:
    """What the answer to a line needs to know of it, whatever is wrong with it.

    Args:
        line: the line.
        number, text: its number in the job and how it stands there, from which its id is made: every worker has the
            same.
    """
    name = hashlib.sha256(b"%d\n" % number + text.strip()).hexdigest()[:24]
    body = line.get("body")
    said = body if isinstance(body, Mapping) else {}
    n, model, form = (said.get(key) for key in ("n", "model", "response_format"))
    return {
        "name": name,
        "custom_id": line.get("custom_id"),
        "n": n if type(n) is int and 1 <= n <= MAX_N else None,
        "chat": line.get("url") == CHAT,
        "model": model if isinstance(model, str) else "bagel",
        "response_format": form,
    }


def request_fields(line: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """The fields of a `RequestForm` that a line asks for, and how many answers, if it says so.

    Raises:
        InputError: it asks for what is not here, or is not what its type says.
    """
    custom_id, url, body = (line.get(name) for name in ("custom_id", "url", "body"))
    for name in line:
        if name not in ("custom_id", "method", "url", "body"):
            raise InputError(f"the line has {name}; it must have custom_id, method, url and body")
    checked("custom_id", custom_id, Annotated[str, Meta(min_length=1)])
    checked("method", line.get("method"), Literal["POST"])
    checked("url", url, Literal[tuple(_BODIES)])
    checked("body", body, _Object)
    form = _BODIES[url]
    said = _without_nulls(body)
    for name in said:
        if name not in field_types(form):
            raise InputError(f"the body has {name}, which has no meaning for this model at {url}; leave it out")
    asked = read(said, form)
    fields = {"id": custom_id, **settings_of(asked)}
    fields |= _without_nulls({name: getattr(asked, name) for name in ("seed", "think", "negative_prompt")})
    fields |= {CHAT: _chat, GENERATIONS: _generation, EDITS: _edit}[url](asked)
    return fields, asked.n


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Null is how OpenAI's clients say nothing."""
    return {name: value for name, value in fields.items() if value is not None}


def _generation(asked: Any) -> dict[str, Any]:
    fields = {"modality": "text2img", "prompt": asked.prompt}
    if asked.size in (None, "auto"):
        return fields
    found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", asked.size, re.ASCII)
    if found is None:
        raise InputError(f"size is {asked.size!r}; it must be WIDTHxHEIGHT in pixels, as 1024x768, or auto")
    if asked.width is not None or asked.height is not None:
        raise InputError("size was given beside width or height; give one of them")
    return fields | {"width": int(found[1]), "height": int(found[2])}


def _edit(asked: Any) -> dict[str, Any]:
    if asked.size not in (None, "auto"):
        raise InputError(f"size is {asked.size!r}; it must be auto, or left out: an edit keeps its image's size")
    if (asked.image is None) == (asked.images is None):
        raise InputError(f"{'neither' if asked.image is None else 'both'} of image and images was given; give one")
    name = "image" if asked.images is None else "images"
    given = getattr(asked, name)
    images = [_image(f"{name}[{i}]", item) for i, item in enumerate(given)] if isinstance(given, list) else None
    return {"modality": "img2img", "prompt": asked.prompt, "images": images or [_image(name, given)]}


def _image(name: str, given: Any) -> str:
    """The path or URL of an image to edit."""
    if isinstance(given, Mapping) and isinstance(given.get("image_url"), str):
        return given["image_url"]
    if isinstance(given, str):
        return given
    return checked(name, given, Annotated[str, Meta(extra={"is": 'a data: URL, a path, or {"image_url": …} with one'})])


def _chat(asked: Any) -> dict[str, Any]:
    inputs, role = [], ""
    for i, data in enumerate(asked.messages):
        message = read(_without_nulls(data), _Message, f"messages[{i}]")
        role = message.role
        inputs += _content(f"messages[{i}].content", message.content)
    if role != "user":
        raise InputError(f"the last message is of role {role}; it must be the user's, which is answered")
    if (asked.response_format or {}).get("type", "text") != "text":
        raise InputError(f"response_format is {asked.response_format}; it must be of type text, or left out")
    limits = {asked.max_tokens, asked.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise InputError("max_tokens and max_completion_tokens were given and differ; give one of them")
    fields = {"modality": "text2text" if all(isinstance(item, str) for item in inputs) else "img2text"}
    fields["inputs"] = inputs
    if limits:
        fields["max_tokens"] = limits.pop()
    if asked.temperature is not None:
        fields["do_sample"] = asked.temperature > 0
        if asked.temperature > 0:
            fields["text_temperature"] = asked.temperature
    elif asked.top_p is not None and asked.top_p < 1 and asked.do_sample is None:  # means nothing to the likeliest
        fields["do_sample"] = True
    return fields


def _content(name: str, content: Any) -> list[str | dict[str, str]]:
    """A message's texts and images as `inputs` have them; texts that follow one another are one."""
    if isinstance(content, str):
        return [content]
    parts = checked(name, content, Annotated[tuple[_Object, ...], Meta(min_length=1, extra={"is": "a text or parts"})])
    found: list[str | dict[str, str]] = []
    for i, data in enumerate(parts):
        place, kind = f"{name}[{i}]", data.get("type")
        if kind == "image_url":
            found.append({"image": read(data, _Image, place).image_url.url})
        elif kind != "text":
            raise InputError(f"{place}.type is {kind!r}; it must be text or image_url")
        elif found and isinstance(found[-1], str):
            found[-1] += "\n" + read(data, _Text, place).text
        else:
            found.append(read(data, _Text, place).text)
    return found
