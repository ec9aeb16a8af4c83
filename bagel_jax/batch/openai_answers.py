"""Answers to `openai_lines.py`, as OpenAI's batches have them in their output and error files."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def answer(record: Mapping[str, Any], image_bytes: Callable[[str], bytes], *, embed: bool) -> dict[str, Any]:
    """A record of a line in OpenAI's form as OpenAI has it.

    Args:
        record: what came of the line, with the `openai` that `openai_lines.heading` gave it.
        image_bytes: reads an image by its path in the record.
        embed: whether images stand in the answer where the line does not say.
    """
    asked, came = record["openai"], record.get("images", [record])
    status, body = 200, {}
    if record["status"] == "error":
        status, body = _error(record)
    elif asked["chat"]:
        body = _completion(asked, came)
    else:
        inside = embed if asked["response_format"] is None else asked["response_format"] == "b64_json"
        data = [_image(one, record["seed"], image_bytes(one["image"]) if inside else None) for one in came]
        body = {"created": int(time.time()), "data": data}
    response = {"status_code": status, "request_id": f"req_{asked['name']}", "body": body}
    return {
        "id": f"batch_req_{asked['name']}",
        "custom_id": asked["custom_id"],
        "response": response,
        "error": None,  # of batches that expire
    }


def apart(answered: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An answer that is no error as one for each image or choice in it."""
    response = answered["response"]
    name = "choices" if "choices" in response["body"] else "data"
    return [
        answered | {"response": response | {"body": response["body"] | {name: [one]}}} for one in response["body"][name]
    ]


def _error(record: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    status, kind = (400, "invalid_request_error") if record["kind"] == "InputError" else (500, "server_error")
    return status, {"error": {"message": record["error"], "type": kind, "param": None, "code": None}}


def _image(one: Mapping[str, Any], seed: int, data: bytes | None) -> dict[str, Any]:
    image = {"url": one["image"]} if data is None else {"b64_json": base64.b64encode(data).decode()}
    plan = {} if one["text"] is None else {"revised_prompt": one["text"]}
    return image | plan | {"seed": one.get("seed", seed)}


def _completion(asked: Mapping[str, Any], came: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": one["text"], "refusal": None},
            "logprobs": None,
            "finish_reason": "length" if one["decoded_tokens"] >= one["settings"]["max_tokens"] else "stop",
        }
        for i, one in enumerate(came)
    ]
    completion = {
        "id": f"chatcmpl-{asked['name']}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked["model"],
        "choices": choices,
    }
    prompt = came[0]["prefilled_tokens"] + came[0]["cached_prefix_tokens"]
    decoded = sum(one["decoded_tokens"] for one in came)
    if prompt and decoded:
        usage = {"prompt_tokens": prompt, "completion_tokens": decoded, "total_tokens": prompt + decoded}
        completion["usage"] = usage
    return completion
