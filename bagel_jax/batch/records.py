"""What stands in a line of a part: records in our form, all alike, and those in OpenAI's.

Readers of tables take their columns, and what is in them, from the first lines that they see. So a record has all
fields, an error among them is a text wherever it is none, and seconds are of all phases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bagel_jax.batch import openai_answers

_FIELDS = (
    *("id", "line", "status", "error", "kind", "modality", "prompt", "seed", "metadata", "text", "image", "size"),
    *("think", "negative_prompt", "settings", "seconds", "time_to_first_token", "tokens_per_second"),
    *("prefilled_tokens", "cached_prefix_tokens", "decoded_tokens", "notes"),
)
_OF_A_LINE = frozenset({"id", "line", "modality", "prompt", "metadata"})
_PHASES = "load", "compile", "wait", "prefill", "decode", "preempted", "denoise", "pixels"


def uniform(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with all fields; its `images`, if there are several, likewise."""
    whole = {name: record.get(name) for name in _FIELDS} | record
    whole |= {name: whole[name] or "" for name in ("error", "kind")}
    if whole["seconds"] is not None:
        whole["seconds"] = dict.fromkeys(_PHASES, 0.0) | {k: s or 0.0 for k, s in whole["seconds"].items()}
    if "images" in whole:
        images = map(uniform, whole["images"])
        whole["images"] = [{k: v for k, v in one.items() if k not in _OF_A_LINE} for one in images]
    return whole


def failed(record: Mapping[str, Any]) -> bool:
    """Whether a line's record, in our form or in OpenAI's, is an error."""
    return record["response"]["status_code"] != 200 if "response" in record else record["status"] == "error"


def answers(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a record, which is no error, says of each image or text; of OpenAI's no more than they have."""
    if "response" not in record:
        return record.get("images", [record])
    body = record["response"]["body"]
    if "data" in body:
        return [{"image": one.get("url", "")} for one in body["data"]]
    tokens = body.get("usage", {}).get("completion_tokens", 0)  # of all of them
    return [{"image": None, "decoded_tokens": 0 if i else tokens} for i, _ in enumerate(body["choices"])]


def apart(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line's record, which is no error, as one for each of its images or texts."""
    if "response" in record:
        return openai_answers.apart(record)
    whole = {key: value for key, value in record.items() if key != "images"}
    return [whole | one for one in record.get("images", [record])]
