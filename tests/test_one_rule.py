"""The rules of contexts are in one place: where a token stands and what it sees is computed in `layout.py` alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import bagel_jax

PACKAGE = Path(bagel_jax.__file__).parent
# Kernels take `kv_end` as an argument, and cut the work by it.
FILES = [
    file
    for file in sorted(PACKAGE.rglob("*.py"))
    if file != PACKAGE / "layout.py" and PACKAGE / "pallas" not in file.parents
]
RULES = {"kv_end", "kv_start", "rope", "rope_advance", "text_kv_end", "block_kv_end"}
# Who puts the ids of the two markers around a block into the model's input; all others hand them on as a pair.
MARKERS = {"vision_start", "vision_end"}
# What is done with these values besides handing them on. Each is a lookup or a comparison, none a rule.
ALLOWED = {
    # A page for each place that a noised block's tokens take, the places beyond it going to page 0.
    ("engine/denoise/steps.py", "place < kv_end[:, None]"),
    # Whether a segment is wholly computed, shared, or kept.
    ("engine/context/jobs.py", "placed.kv_end > self.computed"),
    ("engine/context/jobs.py", "p.kv_end <= one.shared"),
    ("engine/context/scheduler.py", "sequence.computed < placed.kv_end <= end"),
    ("engine/context/scheduler.py", "p.kv_end > length"),
    ("engine/context/scheduler.py", "placed.kv_end > s.computed"),
    # How much of a text was computed before.
    ("engine/context/scheduler.py", "sequence.computed + _planned(chunk, image) - placed.kv_start"),
    # Tables of such values against each other.
    ("engine/handoff.py", "self.rope.shape != views"),
}
ARITHMETIC = ast.BinOp | ast.UnaryOp | ast.Compare | ast.AugAssign


def name_of(node: ast.AST) -> str | None:
    """What a value is called."""
    if isinstance(node, ast.Subscript):
        return name_of(node.value)
    if isinstance(node, ast.Call):
        return name_of(node.func)
    return {ast.Name: lambda: node.id, ast.Attribute: lambda: node.attr}.get(type(node), lambda: None)()


def operands(node: ast.AST) -> list[ast.AST]:
    """What an expression computes with, seen through further arithmetic."""
    parts = {
        ast.BinOp: lambda: [node.left, node.right],
        ast.UnaryOp: lambda: [node.operand],
        ast.Compare: lambda: [node.left, *node.comparators],
        ast.AugAssign: lambda: [node.target, node.value],
    }[type(node)]()
    return [leaf for part in parts for leaf in (operands(part) if isinstance(part, ARITHMETIC) else [part])]


def computed(file: Path) -> set[tuple[str, str]]:
    """Arithmetic with one of the values that rules give."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            continue
        if isinstance(node, ARITHMETIC):
            names = {name_of(leaf) for leaf in operands(node)}
            # `.shape` and the like of an array say nothing of what is in it.
            names |= {name_of(leaf.value) for leaf in operands(node) if isinstance(leaf, ast.Attribute)}
            if names & RULES:
                found.add((file.relative_to(PACKAGE).as_posix(), ast.unparse(node)))
    return found


def marked(file: Path) -> list[str]:
    """Uses of one marker's id that is not one of the pair `vision_start, vision_end`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    paired = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.Tuple) and {name_of(part) for part in node.elts} >= MARKERS
        for part in node.elts
    } | {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.List) and {name_of(part) for part in node.elts} == MARKERS
        for part in node.elts
    }
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.Attribute) and name_of(node) in MARKERS and id(node) not in paired
    ]


def test_kv_end_and_rope_are_computed_in_the_layout():
    """Serving and training disagree on what a token sees or where it stands: noise, from a model that learned well."""
    found = {one for file in FILES for one in computed(file)}
    assert found - ALLOWED == set()
    assert ALLOWED - found == set()  # or else the list is not of what is there


def test_markers_are_put_in_by_the_layout():
    """A block's markers are swapped in one of the places that put them around it."""
    assert {file.name: marked(file) for file in FILES if marked(file)} == {}


@pytest.mark.parametrize(
    "line",
    [
        "end = kv_end + 1",
        "rope = rope + segment.rope_advance",
        "rope += 1",
        "kv_end[at] = start + segment.num_tokens - placed.kv_start",
        "x = jnp.where(rows.rope > 3, 1, 2)",
        "y = -chunk.kv_end",
        "z = text_kv_end(place) - 1",
    ],
)
def test_rules_elsewhere_are_found(tmp_path, monkeypatch, line):
    """The test of this file passes whatever is written."""
    monkeypatch.setattr("test_one_rule.PACKAGE", tmp_path)
    file = tmp_path / "other.py"
    file.write_text(line)
    assert computed(file)
    file.write_text("rope, kv_end = laid.rope, laid.kv_end\nf(rope=a.rope, kv_end=jnp.where(done, 0, text_kv_end(x)))")
    assert not computed(file)
    file.write_text("ids = [tokenizer.vision_start, *own]")
    assert marked(file)
    file.write_text("markers = tokenizer.vision_start, tokenizer.vision_end")
    assert not marked(file)
