"""The house: a room imports downwards only, as docs/architecture.md says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bagel_jax"

# Which rooms a room may import, from the top floor down; errors is open to all.
MAY_IMPORT = {
    "__init__": {"bagel", "request", "settings", "functional"},
    "run": {"bagel", "demo", "request", "options", "results", "settings", "turns", "command", "hosts"},
    "batch": {"bagel", "demo", "request", "options", "results", "settings", "command", "hosts"},
    "verify": {"bagel", "checkpoint", "demo", "request", "config", "settings", "command"},
    "turns": {"engine", "request", "options"},
    "results": {"request"},
    "aot": {
        *("engine", "models", "pallas", "placement", "layout", "config", "buckets", "settings", "devices", "command"),
    },
    "bagel": {
        *("engine", "functional", "demo", "checkpoint", "models", "inputs", "request", "config", "settings"),
        "placement",
    },
    "functional": {"models", "layout", "sampling", "inputs", "request", "config"},
    "train": {"checkpoint", "models", "inputs", "request", "config", "layout", "placement"},
    "demo": set(),
    "engine": {
        *("sampling", "models", "inputs", "request", "config", "layout", "settings", "clock", "pallas", "buckets"),
        "placement",
        "devices",
    },
    "checkpoint": {"models", "config"},
    "models": {"config", "layout"},
    "sampling": {"request"},
    "inputs": {"request", "config", "layout"},
    "request": {"config", "options"},
    "options": set(),
    "settings": {"devices"},
    "buckets": set(),
    "clock": set(),
    "command": set(),
    "hosts": {"command"},
    "pallas": set(),
    "placement": {"models", "settings", "config", "devices"},
    "layout": set(),
    "config": set(),
    "devices": set(),
    "errors": set(),
}


def _imported(file: Path) -> set[str]:
    """Rooms that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bagel_jax"):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("bagel_jax.")}
    return {name.split(".")[1] for name in names if "." in name}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_down(file):
    """A circle, or a network that knows about serving, would make the package hard to take apart."""
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert _imported(file) - {room, "errors"} <= MAY_IMPORT[room]


def test_no_circles():
    """A table that allows a circle would forbid nothing."""
    left = dict(MAY_IMPORT)
    while left:
        free = [room for room, below in left.items() if not below & set(left)]
        assert free, f"a circle among {sorted(left)}"
        left = {room: below for room, below in left.items() if room not in free}
