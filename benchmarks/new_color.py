"""Scores text2img on a colour that a fine-tuned demo model has learned, by the oracle.

    python benchmarks/new_color.py --model runs/pink/model/export --color pink

Every shape on every ground once a round, with the command line's default settings and fixed seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from oracle import read
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from bagel_jax import Bagel
from bagel_jax.errors import InputError, check_choice, check_whole
from tools.demo.world import COLORS, NEW_COLORS, SHAPES, Combination, caption


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for bad input."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--model", metavar="DIR", type=Path, required=True, help="the fine-tuned checkpoint")
    p.add_argument("--color", metavar="NAME", default="pink", help="the colour (%(default)s)")
    p.add_argument("--rounds", metavar="N", type=int, default=3, help="of 32 images each (%(default)s)")
    p.add_argument("--save", metavar="DIR", type=Path, help="a folder for all images")
    args = p.parse_args(argv)
    try:
        check_choice("color", args.color, tuple(NEW_COLORS))
        check_whole("rounds", args.rounds, 1)
        model = Bagel.load(args.model)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cases = [Combination(args.color, *pair) for _ in range(args.rounds) for pair in product(SHAPES, COLORS)]
    right = 0
    for seed, c in enumerate(tqdm(cases, unit="case")):
        image = model.generate("text2img", caption(c), height=64, width=64, seed=seed).image
        reading = read(image, {args.color: NEW_COLORS[args.color]})
        right += reading.shows(c.color, c.shape, c.ground)
        if args.save is not None:
            args.save.mkdir(parents=True, exist_ok=True)
            image.save(args.save / f"{seed:03d}.png")
    print(f"{right} of {len(cases)} right: {100 * right / len(cases):.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
