"""What is counted of a job: by parts, and summed up from these counts alone, so that every worker finds the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from bagel_jax.batch.records import answers

_SUMS = "requests", "images", "decoded_tokens"


def tally(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of records that are no errors: requests, images, tokens of texts, and the requests' seconds by phase."""
    sums, seconds = Counter(dict.fromkeys(_SUMS, 0)), Counter()
    for record in records:
        for one in answers(record):
            sums["requests"] += 1
            sums["images"] += one.get("image") is not None
            sums["decoded_tokens"] += one.get("decoded_tokens", 0)
            # Loading is not a request's own: all of a worker have it.
            seconds.update({phase: s for phase, s in one.get("seconds", {}).items() if phase != "load" and s})
    return {**sums, "request_seconds": _rounded(seconds)}


def summary(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `summary.json` says.

    Args:
        parts: of each part `lines`, `errors` by kind, `worked`, the stretches of time from a claim of its block to its
            results, and what `tally` counted.
    """
    errors, seconds, sums = Counter(), Counter(), Counter(dict.fromkeys(_SUMS, 0))
    for part in parts:
        errors.update(part["errors"])
        seconds.update(part["request_seconds"])
        sums.update({name: part[name] for name in _SUMS})
    lines = sum(part["lines"] for part in parts)
    worked = sorted(stretch for part in parts for stretch in part["worked"])
    busy = _covered(worked)
    return {
        "lines": lines,
        "ok": lines - errors.total(),
        "errors": dict(sorted(errors.items())),
        "parts": len(parts),
        **sums,
        "began": _date(worked[0][0]),
        "ended": _date(max(end for _, end in worked)),
        "busy_seconds": round(busy, 3),
        "requests_per_second": round(sums["requests"] / max(busy, 1e-3), 3),
        "request_seconds": _rounded(seconds),
    }


def table(found: Mapping[str, Any]) -> str:
    """A summary as lines for a person."""
    rows = [("lines", found["lines"]), ("  ok", found["ok"])]
    rows += [(f"  {kind}", count) for kind, count in found["errors"].items()]
    rows += [("images", found["images"]), ("tokens of texts", found["decoded_tokens"])]
    rows += [("seconds at work", found["busy_seconds"]), ("requests/s", found["requests_per_second"])]
    rows += [("sum of requests' seconds", sum(found["request_seconds"].values()))]
    rows += [(f"  {phase}", seconds) for phase, seconds in found["request_seconds"].items()]
    width = max(len(name) for name, _ in rows)
    return "".join(
        f"  {name:{width}}  {value:12,}\n" if isinstance(value, int) else f"  {name:{width}}  {value:15,.2f}\n"
        for name, value in rows
    )


def _covered(stretches: Iterable[Sequence[float]]) -> float:
    """Seconds that lie in at least one of the stretches, which come in order of their beginnings."""
    covered, until = 0.0, float("-inf")
    for began, ended in stretches:
        covered += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return covered


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {phase: round(value, 3) for phase, value in sorted(seconds.items())}
