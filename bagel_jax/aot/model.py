"""Compiles every program of the published model for a slice, each in a process of its own, and says what it costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

from bagel_jax.aot.cost import Exchange, link_bytes
from bagel_jax.aot.targets import CHIPS, SLICES, TARGETS, devices
from bagel_jax.command import DONE, FAILED
from bagel_jax.devices import MeshShape
from bagel_jax.errors import InputError, check_whole

LIMIT = 900  # seconds that a program may take
_GIB = 2**30


class Asked(NamedTuple):
    """What to compile for."""

    target: str  # of `SLICES`
    mesh: MeshShape | None  # None: what the engine would choose
    dtype: str
    size: int  # pixels, of a side of the larger images

    def chosen(self) -> MeshShape:
        """The mesh.

        Raises:
            InputError: it is not as large as the slice.
        """
        chip, count, _ = SLICES[self.target]
        if self.mesh is None:
            from bagel_jax.aot.published import PUBLISHED
            from bagel_jax.models.weights import weight_bytes
            from bagel_jax.placement.placement import mesh_within

            return mesh_within(int(CHIPS[chip].memory * _GIB), count, weight_bytes(PUBLISHED, self.dtype))
        if self.mesh.size != count:
            raise InputError(
                f"--mesh is {self.mesh}, of {self.mesh.size} devices, but {self.target} has {count}; "
                "the numbers must be the same"
            )
        return self.mesh


def model(asked: Asked, only: str = "") -> int:
    """Compiles all programs, a line each; returns the exit code.

    Args:
        asked: what for.
        only: leaves out programs without this in their names.

    Raises:
        InputError: the slice's compiler is not installed, or the mesh or the size make no sense.
    """
    check_whole("--size", asked.size, 512, 1024)
    if asked.size % 16:
        raise InputError(f"--size is {asked.size}; it must be a multiple of 16")
    chip, count, topology = SLICES[asked.target]
    devices(chip, TARGETS[chip], topology)  # refused here, once, if it is not installed
    mesh = asked.chosen()
    plan = _one(asked, mesh, "")
    if isinstance(plan, str):
        raise InputError(f"--target {asked.target}: the model cannot be laid out ({plan})")
    names = [name for name in plan["names"] if only in name]
    if not names:
        raise InputError(f"--only is {only!r}, which is in no program's name; there are: {'; '.join(plan['names'])}")
    room = CHIPS[chip].memory
    weights, pages = (plan[name] / _GIB for name in ("weights", "pages"))
    print(
        f"{asked.target}, mesh {mesh}, {asked.dtype}: a device of {room} GiB holds weights of {weights:.2f} and "
        f"{plan['num_pages']} pages of {pages:.2f}; nothing here has run on it"
    )
    print("| program | temporaries, GiB | left, GiB | collectives a device | compiled, s | estimate, ms |")
    print("|---|---|---|---|---|---|", flush=True)
    failed, total = [], 0.0
    for name in names:
        said = _one(asked, mesh, name)
        if isinstance(said, str):
            failed.append(name)
            print(f"| {name} | FAILED: {said} | | | | |", flush=True)
            continue
        total += said["seconds"]
        temporary = said["temporary"] / _GIB
        left = room - weights - pages - temporary
        exchanges = [Exchange(*x) for x in said["exchanges"]]
        if left < 0:
            failed.append(name)
        print(
            f"| {name} | {temporary:.2f} | {left:.2f}{' DOES NOT FIT' if left < 0 else ''} | {_told(exchanges)} | "
            f"{said['seconds']:.0f} | {_estimate(said, exchanges, chip, count):.1f} |",
            flush=True,
        )
    print(f"{len(names) - len(failed)} of {len(names)} programs are good; {total:.0f} s to compile them all")
    return FAILED if failed else DONE


def _estimate(said: dict[str, Any], exchanges: list[Exchange], chip: str, count: int) -> float:
    """Milliseconds: operations or memory, whichever takes longer, and the links; what a maker promises, never reached.

    Memory: the weights that the program has among its arguments, once, and the keys and values that it attends to.
    """
    rates = CHIPS[chip]
    compute = said["flops"] / (rates.compute * 1e12)
    pages = said["pages"] if said["kv"] else 0  # an argument of which only some are read
    memory = (said["arguments"] - pages + said["kv"]) / (rates.bandwidth * 1e9)
    links = link_bytes(exchanges, count) / (rates.links * 1e9)
    return 1e3 * (max(compute, memory) + links)


def _told(exchanges: list[Exchange]) -> str:
    return ", ".join(f"{x.count} {x.kind} {_size(x.bytes)}" for x in exchanges) or "none"


def _size(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"


def _one(asked: Asked, mesh: MeshShape, name: str) -> dict[str, Any] | str:
    """What `one.py` says of a program, or in a sentence why it says nothing."""
    arguments = json.dumps([asked.target, list(mesh), asked.dtype, asked.size])
    command = [sys.executable, "-m", "bagel_jax.aot.one", arguments, name]
    # Numbers of the command line's own process are not the child's.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment)
    except subprocess.TimeoutExpired:
        return f"not compiled in {LIMIT} s"
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode < 0:
        reasons = [line for line in lines if "Check failed" in line or line.startswith("F0")]
        return f"the compiler ended its process (signal {-done.returncode}) {' '.join(reasons)[:300]}".strip()
    errors = [line for line in lines if "Error" in line or "RESOURCE_EXHAUSTED" in line]
    return (errors or lines or ["no word"])[-1][:300].replace("|", "/")
