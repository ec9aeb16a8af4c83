#!/usr/bin/env python3
"""Writes a BAGEL model in the published layout (ema.safetensors and so on), for the official PyTorch code to load."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax.numpy as jnp
from tqdm import tqdm

from bagel_jax.checkpoint.export import export, stored_arrays
from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.errors import InputError
from bagel_jax.train.config import is_run
from bagel_jax.train.packages import check_packages


def _model(source: Path):
    """Parameters by path, sizes, and the folder of the tokenizer."""
    if is_run(source):
        check_packages()
        from bagel_jax.train.result import trained  # late: a plain checkpoint is written without training's packages

        params, start = trained(source)
        return params, start.config, start.tokenizer_folder
    model = ModelSource.open(source)
    return stored_arrays(model), model.config, source


def main() -> int:
    """Runs the command line; returns the exit code: 0 or 2 (bad input)."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help="what --model of bagel_jax.run takes, or the output folder of a training run",
    )
    p.add_argument("destination", metavar="DST", type=Path, help="the directory to write; must not exist")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), help="of every tensor (default: as in SRC)")
    args = p.parse_args()
    try:
        arrays, config, tokenizer = _model(args.source)
        with tqdm(total=len(arrays), desc="exporting", unit="parameter") as bar:
            dtype = None if args.dtype is None else jnp.dtype(args.dtype)
            export(arrays, config, tokenizer, args.destination, dtype, lambda done, _: bar.update(done - bar.n))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    missing = [name for name in ("vocab.json", "merges.txt") if not (args.destination / name).exists()]
    if missing:
        print(f"note: no {' and no '.join(missing)} here; the official code's tokenizer needs them")
    print(f"wrote {args.destination}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
