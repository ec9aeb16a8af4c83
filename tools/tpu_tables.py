"""Writes what `python -m bagel_jax.aot model` says of slices into docs/tpu.md.

    python tools/tpu_tables.py v5e-8 v6e-4    # without names, all slices; about ten minutes each on two cores

Each table stands between two comments with the slice's name; `--from DIR` takes DIR/SLICE.txt instead of compiling.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from bagel_jax.aot.targets import SLICES

PAGE = Path(__file__).parents[1] / "docs" / "tpu.md"


def written(page: str, name: str, said: str) -> str:
    """The page with another table of a slice.

    Raises:
        ValueError: the page has no place for it.
    """
    before, start, rest = page.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->\n")
    if not start or not end:
        raise ValueError(f"{PAGE} has no comments that begin and end {name}")
    head, *table, total = said.strip().splitlines()
    return f"{before}{start}{head}.\n\n" + "\n".join(table) + f"\n\n{total}.\n{end}{after}"


def main() -> None:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("slices", nargs="*", metavar="SLICE", default=list(SLICES))
    p.add_argument("--from", dest="folder", type=Path, metavar="DIR")
    args = p.parse_args()
    for name in args.slices:
        if args.folder is None:
            command = [sys.executable, "-m", "bagel_jax.aot", "model", "--target", name]
            said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        else:
            said = (args.folder / f"{name}.txt").read_text(encoding="utf-8")
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), name, said), encoding="utf-8")


if __name__ == "__main__":
    main()
