"""Meshes of several GPUs against one, alternately: `python benchmarks/gpu/meshes.py data=2 sequence=2 tensor=2`.

The 7B model with random weights in bfloat16; images of 1024² and texts of a 512² image. Medians and ratios are printed
for each mesh, which is dropped before the next one is made; the model on one GPU stays.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from statistics import median

import jax
import numpy as np
from model import random_bagel
from PIL import Image

from bagel_jax import Request
from bagel_jax.bagel import Bagel


def photo(size: int, seed: int) -> Image.Image:
    """An image of eight by eight colours."""
    colours = np.random.RandomState(seed).randint(0, 256, (8, 8, 3)).astype(np.uint8)
    return Image.fromarray(colours).resize((size, size))


def image_seconds(model: Bagel, modality: str, size: int, steps: int, seed: int) -> float:
    """Seconds of one image."""
    inputs = {"height": size, "width": size} if modality == "text2img" else {"image": photo(size, seed)}
    started = time.perf_counter()
    model.generate(modality, "a red bench", steps=steps, seed=seed, **inputs)
    return time.perf_counter() - started


def token_seconds(model: Bagel, batch: int, seed: int) -> float:
    """Seconds a token of answers to so many questions at once, the first token left out."""
    requests = [
        Request.create("img2text", "Describe it in every detail", photo(512, seed * 100 + i), max_tokens=129, seed=i)
        for i in range(batch)
    ]
    answers = [result for _, result in model.run_many(requests)]
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return 1 / (batch * median(answer.tokens_per_second for answer in answers))


def main() -> None:
    """Runs the command line."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("meshes", nargs="+", metavar="MESH")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--size", type=int, default=1024)
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    args = p.parse_args()
    settings = {"ar_max_num_seqs": max([1, *args.batches]), "num_pages": 500}
    jobs = {
        **{modality: (image_seconds, modality, args.size, args.steps) for modality in ("text2img", "img2img")},
        **{f"a token of {batch}": (token_seconds, batch) for batch in args.batches},
    }
    one = random_bagel(ar_device=0, **settings)
    print(jax.devices()[0].device_kind, len(jax.devices()), "jax", jax.__version__, flush=True)
    for mesh in args.meshes:
        started = time.perf_counter()
        other = random_bagel(mesh=mesh, **settings)
        print(f"{mesh}: loaded in {time.perf_counter() - started:.0f} s", flush=True)
        for name, (function, *about) in jobs.items():
            started = time.perf_counter()
            for model in (one, other):  # compiles
                function(model, *about, 0)
            ready = time.perf_counter() - started
            turns = [[function(model, *about, turn) for model in (one, other)] for turn in range(1, 1 + args.turns)]
            ours, theirs = (median(column) for column in zip(*turns, strict=True))
            print(
                f"{mesh}: {name}: one {ours:.5f} s, mesh {theirs:.5f} s, {ours / theirs:.2f} times "
                f"(warm-up {ready:.0f} s)",
                flush=True,
            )
        other.close()
        del other
        gc.collect()
    one.close()
    os._exit(0)


if __name__ == "__main__":
    main()
