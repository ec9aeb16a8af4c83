#!/usr/bin/env python3
"""Converts a published BAGEL checkpoint to a sharded Orbax one, or shows (`--dry-run`) how its tensors map."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax.numpy as jnp
from tqdm import tqdm

from bagel_jax.checkpoint.files import CheckpointFiles
from bagel_jax.checkpoint.load import PublishedCheckpoint, Report
from bagel_jax.checkpoint.sizes import read_config
from bagel_jax.checkpoint.store import MANIFEST, convert
from bagel_jax.checkpoint.table import AUTOENCODER, MAIN
from bagel_jax.errors import InputError


def main() -> int:
    """Runs the command line; returns the exit code: 0, 1 (dry run: the checkpoint does not fit), 2 (bad input)."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument("source", metavar="SRC", type=Path, help="a checkpoint in the published layout")
    p.add_argument("destination", metavar="DST", type=Path, nargs="?", help="the directory to write; must not exist")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), help="of every parameter (default: as in SRC)")
    p.add_argument("--dry-run", action="store_true", help="write nothing; show what maps where; exit 1 if not all fits")
    args = p.parse_args()
    if args.destination is None and not args.dry_run:
        p.error("DST is missing; give the directory to write, or --dry-run")
    if not args.source.is_dir():
        print(f"error: {args.source} is not a directory; give one that holds a BAGEL checkpoint", file=sys.stderr)
        return 2
    if (args.source / MANIFEST).exists():
        print(f"error: {args.source} is converted already; use it as --model", file=sys.stderr)
        return 2
    try:
        files = CheckpointFiles(args.source)
        checkpoint = PublishedCheckpoint(files, read_config(files))
        if args.dry_run:
            return show(checkpoint)
        with tqdm(total=len(checkpoint.targets), desc="converting", unit="parameter") as bar:
            dtype = None if args.dtype is None else jnp.dtype(args.dtype)
            convert(checkpoint, args.destination, dtype, lambda done, _: bar.update(done - bar.n))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if args.dry_run else 2
    print(f"wrote {args.destination}")
    return 0


def show(checkpoint: PublishedCheckpoint) -> int:
    """Prints the table of a dry run; returns the exit code."""
    report = checkpoint.report()
    print(table(report))
    files = checkpoint.files
    counts = len(files.tensors[MAIN]), len(files.tensors[AUTOENCODER])
    print(f"\n{counts[0]:,} tensors in the model, {counts[1]:,} in the autoencoder")
    if not any((files.directory / name).exists() for name in ("tokenizer.json", "vocab.json")):
        print("note: no tokenizer files here; a model needs them to run")
    for title, names in (
        ("missing", report.missing),
        ("unexpected", report.unexpected),
        ("wrong shape", report.wrong_shape),
    ):
        print(f"{title}: {len(names) or 'none'}")
        for name in names:
            print(f"  {name}")
    return 1 if report.problems else 0


def table(report: Report) -> str:
    """Tensors, parameters and bytes of each component, and of all."""
    rows = [("component", "tensors", "parameters", "bytes")]
    totals = [0, 0, 0]
    for component, tensors in report.tensors.items():
        numbers = len(tensors), sum(t.size for t in tensors), sum(t.num_bytes for t in tensors)
        totals = [a + b for a, b in zip(totals, numbers, strict=True)]
        rows.append((component, *(f"{n:,}" for n in numbers)))
    rows.append(("total", *(f"{n:,}" for n in totals)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
