"""What a compiled program costs: operations, with loops counted as often as they run, and what goes over links."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Any, NamedTuple

_COLLECTIVES = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"
_BITS = {"pred": 8, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32}
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_KIND = re.compile(rf"\s({'|'.join(_COLLECTIVES)})(-start)?\(")


class Exchange(NamedTuple):
    """One kind of collective in a program."""

    kind: str
    count: int  # in one run, those in loops as often as they run
    bytes: int  # what it leaves on each device, all together


def matmul_flops(jaxpr: Any, *, loops: bool) -> float:
    """Operations of a jaxpr's matrix products and convolutions, two a product, on all devices together.

    Loops over layers count as often as they run, or once without `loops`; a loop of unknown length counts once. Kernels
    count nothing.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, p = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = p["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel, features = equation.invars[1].aval.shape, p["dimension_numbers"].rhs_spec[0]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / kernel[features]
        elif name == "cond":
            total += max(matmul_flops(branch.jaxpr, loops=loops) for branch in p["branches"])
        elif name != "pallas_call":
            times = p["length"] if name == "scan" and loops else 1
            total += times * sum(matmul_flops(inner, loops=loops) for inner in _inner(p))
    return total


def _inner(params: dict[str, Any]) -> list[Any]:
    found = [value for value in params.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
    return [value if hasattr(value, "eqns") else value.jaxpr for value in found if not callable(value)]


def exchanges(hlo: str) -> list[Exchange]:
    """The collectives of an optimised HLO module's text, in one run of it; a loop of unknown length counts once."""
    entry, bodies = _computations(hlo)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def add(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            if kind := _KIND.search(line):
                counts[kind[1]][0] += times
                counts[kind[1]][1] += times * _bytes(line[: kind.start()], started=bool(kind[2]))
            if loop := re.search(r"\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                add(loop[2], times * _rounds(line, bodies[loop[1]]))
            for called in re.findall(r"\b(?:calls|to_apply|called_computations=\{)=?%?([\w.\-]+)", line):
                add(called, times)
            if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
                for branch in branches[1].split(","):
                    add(branch.strip().lstrip("%"), times)

    add(entry, 1)
    return [Exchange(kind, *counts[kind]) for kind in _COLLECTIVES if counts[kind][0]]


def _computations(hlo: str) -> tuple[str, dict[str, list[str]]]:
    """The name of the entry, and the lines of each computation."""
    entry, here, bodies = "", "", defaultdict(list)
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            here = head[2]
            entry = here if head[1] else entry
        else:
            bodies[here].append(line)
    return entry, dict(bodies)


def _rounds(loop: str, condition: list[str]) -> int:
    """How often a loop runs, as its line says or as its condition does, which compares the number with a constant."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop):
        return int(known[1])
    text = "\n".join(condition)
    compared = re.search(r"ROOT .* compare\(.*%([\w.\-]+)\), direction=LT", text)
    limit = compared and re.search(rf"%{re.escape(compared[1])} = .* constant\((\d+)\)", text)
    return int(limit[1]) if limit else 1


def _bytes(result: str, *, started: bool) -> int:
    """Bytes of a result; that of a started collective holds its operands too, of which none is larger."""
    sizes = [
        math.prod(map(int, filter(None, shape.split(",")))) * _BITS.get(kind, 32) // 8
        for kind, shape in _ARRAY.findall(result.split(" = ", 1)[-1])
    ]
    return max(sizes, default=0) if started else sum(sizes)


def link_bytes(found: list[Exchange], devices: int) -> float:
    """What each device sends, if rings of all devices carry it: an all-reduce goes round twice."""
    share = (devices - 1) / devices
    factors = {"all-reduce": 2 * share, "all-gather": share, "all-to-all": share, "reduce-scatter": devices - 1}
    return sum(x.bytes * factors.get(x.kind, 1) for x in found)
