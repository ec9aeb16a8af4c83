"""How far TaylorSeer's images are from the computed ones, and how many evaluations it saves, by its settings.

    python benchmarks/taylorseer.py [--model DIR] [--images 8] [--steps 50]

Error is the relative distance of the last latents, and that of pixels of 255, each the mean over images.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bagel_jax import Bagel  # noqa: E402
from bagel_jax.demo.example import EXAMPLES, MODEL  # noqa: E402
from bagel_jax.sampling.taylorseer import TaylorState  # noqa: E402

GRID = [
    (3, 6),
    (3, 4),
    (3, 3),
    (3, 2),
    (3, 1),
    (3, 0),
    (2, 2),
    (2, 1),
    (4, 2),
    (4, 1),
    (5, 2),
    (5, 1),
]  # interval, order
FIRST = 5
PROMPTS = [
    "a red circle on a white background",
    "a blue star on a yellow background",
    "a green square",
    "a pink triangle",
]


def computed(steps: int, interval: int, order: int) -> int:
    """Evaluations of `steps` schedule points that are computed."""
    state, count = TaylorState(interval, order, FIRST), 0
    for _ in range(steps - 1):
        count += state.computes
        state.take(1)
    return count


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, metavar="DIR")
    parser.add_argument("--images", type=int, default=8, metavar="N")
    parser.add_argument("--steps", type=int, default=50, metavar="N")
    args = parser.parse_args()
    model = Bagel.load(args.model)
    size = min(1024, model.config.max_image_size)

    def draw(modality: str, i: int, **options):
        place = {"height": size, "width": size} if modality == "text2img" else {"image": EXAMPLES["img2img"][1]}
        prompt = PROMPTS[i % len(PROMPTS)] if modality == "text2img" else f"make it {PROMPTS[i % len(PROMPTS)]}"
        result = model.generate(modality, prompt, **place, seed=i, steps=args.steps, **options)
        return result.latents, np.asarray(result.image, np.float32)

    print("| interval | order | computed of | text2img latents | pixels | img2img latents | pixels |")
    print("|---|---|---|---|---|---|---|")
    whole = {m: [draw(m, i) for i in range(args.images)] for m in ("text2img", "img2img")}
    for interval, order in GRID:
        cells = [f"{computed(args.steps, interval, order)} of {args.steps - 1}"]
        how = {"taylorseer_interval": interval, "taylorseer_order": order, "taylorseer_first": FIRST}
        for modality, wanted in whole.items():
            errors = []
            for i, (latents, pixels) in enumerate(wanted):
                ours, drawn = draw(modality, i, taylorseer=True, **how)
                errors.append((np.linalg.norm(ours - latents) / np.linalg.norm(latents), np.abs(drawn - pixels).mean()))
            latents, pixels = np.mean(errors, axis=0)
            cells += [f"{100 * latents:.2f} %", f"{pixels:.2f}"]
        print(f"| {interval} | {order} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
