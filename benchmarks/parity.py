"""Prints how far this implementation is from the official one on the golden cases, in float32 and bfloat16.

    python benchmarks/parity.py

The numbers are relative errors, ‖a - b‖ / ‖b‖, against the official code's float32.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from golden import GENERATION, UNDERSTANDING, Case, relative_error  # noqa: E402

from bagel_jax import Bagel  # noqa: E402


def main() -> None:
    """Runs every case in both dtypes."""
    models = {dtype: Bagel.load(ROOT / "tests/data/tiny-bagel", dtype) for dtype in ("float32", "bfloat16")}
    print("| case | float32 latents | float32 image, of 255 | float32 text | bfloat16 latents |")
    print("|---|---|---|---|---|")
    for name in GENERATION + UNDERSTANDING:
        case = Case.read(ROOT / "tests/data/cases", name)
        results = {dtype: model.run(model.prepare(case.request())) for dtype, model in models.items()}
        ours = results["float32"]
        text = ("equal" if ours.text == case.texts[0] else "differs") if case.texts else ""
        cells = ["", "", text, ""]
        if name in GENERATION:
            golden = case.arrays["final_latent"]
            cells[0] = f"{relative_error(ours.latents, golden):.1e}"
            cells[1] = str(np.abs(np.asarray(ours.image).astype(int) - case.image).max())
            cells[3] = f"{relative_error(results['bfloat16'].latents, golden):.1e}"
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
