"""A mixed load on the engine: requests a second, latency, and how busy each stage is.

    python benchmarks/engine.py [--model DIR] [--requests 24] [--concurrency 1 4 16]
    python benchmarks/engine.py --model DIR --official CHECKOUT --python PYTHON

Half the requests are img2img, a quarter text2img, a quarter img2text; sizes and steps vary. At each concurrency so many
clients each send one request after another. The same requests one at a time, each alone, are measured in turns with it.

With `--official`, a checkout of ByteDance-Seed/Bagel, and the `--python` of an environment with torch 2.13.0 and
transformers 4.49.0, one text2img and one img2img are timed instead, alternately with the official code on the same
weights (`benchmarks/official.py`), both on all cores and in float32. `scripts/random_weights.py` makes a model for it.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bagel_jax import Bagel, Request  # noqa: E402
from bagel_jax.demo.example import MODEL  # noqa: E402
from bagel_jax.settings import EngineConfig  # noqa: E402


def random_image(seed: int, size: int) -> Image.Image:
    """An image of a few soft colours."""
    small = np.random.RandomState(seed).randint(0, 256, (8, 8, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def load(count: int, largest: int, turn: int) -> list[Request]:
    """The requests of a turn; other turns have other images, so that none is found in the prefix cache."""
    random = np.random.RandomState(0)
    requests = []
    for i in range(count):
        side = int(random.choice([largest // 2, 3 * largest // 4, largest])) // 16 * 16
        options = {"seed": i, "request_id": f"{turn}-{i}"}
        if i % 4 == 1:
            made = Request.create(
                "text2img", "a red circle", height=side, width=side, steps=random.randint(5, 16), **options
            )
        elif i % 4 == 3:
            made = Request.create(
                "img2text", "What is it?", random_image(1000 * turn + i, side), max_tokens=16, **options
            )
        else:
            image = random_image(1000 * turn + i, side)
            made = Request.create("img2img", "make it blue", image, steps=random.randint(5, 16), **options)
        requests.append(made)
    return requests


def serve(model: Bagel, requests: list[Request], concurrency: int) -> tuple[float, list[float]]:
    """Seconds that all take, and each, with so many clients."""
    waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
    for request in requests:
        waiting.put(request)
    latencies: list[float] = []

    def client() -> None:
        while True:
            try:
                request = waiting.get_nowait()
            except queue.Empty:
                return
            started = time.perf_counter()
            model.submit(request).result()
            latencies.append(time.perf_counter() - started)

    clients = [threading.Thread(target=client) for _ in range(concurrency)]
    started = time.perf_counter()
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    return time.perf_counter() - started, latencies


def utilisation(model: Bagel, spent: float) -> dict[str, float]:
    """The part of the time that each stage worked, and both did."""
    spans = list(model.engine.work)
    busy = {phase: [(s.started, s.ended) for s in spans if s.phase == phase] for phase in ("context", "denoise")}
    both = sum(max(0.0, min(a[1], d[1]) - max(a[0], d[0])) for a in busy["context"] for d in busy["denoise"])
    return {phase: sum(e - s for s, e in parts) / spent for phase, parts in busy.items()} | {"both": both / spent}


def mixed(args: argparse.Namespace) -> None:
    """The mixed load."""
    settings = EngineConfig(ar_max_num_seqs=args.ar_max_num_seqs, dit_max_num_seqs=args.dit_max_num_seqs)
    model = Bagel.load(args.model, settings=settings)
    largest = min(args.size, model.config.max_image_size)
    turn = 0
    print("| concurrency | requests/s | of one at a time | latency p50 | p95 | stage 0 busy | stage 1 | both |")
    print("|---|---|---|---|---|---|---|---|")
    for concurrency in args.concurrency:
        runs: dict[int, list] = {1: [], concurrency: []}
        for _ in range(1 + args.turns):  # the first one compiles
            for clients in runs:
                turn += 1
                requests = load(args.requests, largest, turn)
                model.engine.work.clear()
                spent, latencies = serve(model, requests, clients)
                runs[clients].append((spent, latencies, utilisation(model, spent)))
        alone = median(spent for spent, _, _ in runs[1][1:])
        spent = median(spent for spent, _, _ in runs[concurrency][1:])
        p50, p95 = np.percentile([x for _, latencies, _ in runs[concurrency][1:] for x in latencies], (50, 95))
        busy = {name: median(u[name] for _, _, u in runs[concurrency][1:]) for name in ("context", "denoise", "both")}
        shares = " | ".join(f"{100 * busy[name]:.0f} %" for name in ("context", "denoise", "both"))
        rates = f"{args.requests / spent:.2f} | {alone / spent:.2f}x"
        print(f"| {concurrency} | {rates} | {p50:.2f} s | {p95:.2f} s | {shares} |", flush=True)


def against_official(args: argparse.Namespace) -> None:
    """Ours and the official code, alternately."""
    model = Bagel.load(args.model, "float32", settings=EngineConfig(prefix_cache=False))
    command = [
        args.python,
        str(ROOT / "benchmarks/official.py"),
        "--official",
        args.official,
        "--model",
        str(args.model),
    ]
    theirs = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    theirs.stdout.readline()
    print("| 256 x 256, 10 steps, three branches | ours | official | ratio | largest difference of 255 |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for modality in ("text2img", "img2img"):
            compare(args, model, theirs, modality, Path(folder))
    theirs.stdin.close()
    theirs.wait()


def compare(args: argparse.Namespace, model: Bagel, theirs: subprocess.Popen, modality: str, folder: Path) -> None:
    """One modality, under the same noise."""
    image, noise = folder / "in.png", {}
    random_image(0, args.size).save(image)
    given = {"height": args.size, "width": args.size} if modality == "text2img" else {"image": Image.open(image).copy()}
    settings = {"steps": 11, "cfg_text_scale": 4.0, "cfg_img_scale": 2.0, "cfg_interval": (0.0, 1.0)}
    prepared = model.prepare(Request.create(modality, "a red circle", **given, **settings))
    noise["latent"] = prepared.initial_latent
    for i, sample in enumerate(prepared.posterior_noise):
        noise[f"vae_{i}"] = sample.transpose(2, 0, 1)[None]
    np.savez(folder / "noise.npz", **noise)
    job = {
        "modality": modality,
        "prompt": "a red circle",
        "num_timesteps": settings["steps"],
        "cfg_text_scale": 4.0,
        "cfg_img_scale": 2.0,
        "cfg_interval": [0.0, 1.0],
        "cfg_renorm_type": prepared.request.settings.cfg_renorm_type,
        "init_noise": str(folder / "noise.npz"),
        "output": str(folder / "theirs.png"),
    }
    job |= {"height": args.size, "width": args.size} if modality == "text2img" else {"image": str(image)}

    def official() -> float:
        theirs.stdin.write(json.dumps(job) + "\n")
        theirs.stdin.flush()
        answer = json.loads(theirs.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["seconds"]

    def ours() -> float:
        nonlocal result
        started = time.perf_counter()
        result = model.generate(modality, "a red circle", **given, **settings, init_noise=noise)
        return time.perf_counter() - started

    result = None
    times = [(ours(), official()) for _ in range(1 + args.turns)][1:]
    mine, other = (median(column) for column in zip(*times, strict=True))
    pixels = [np.asarray(p, np.int32) for p in (result.image, Image.open(folder / "theirs.png"))]
    difference = np.abs(pixels[0] - pixels[1]).max()
    print(f"| {modality} | {mine:.2f} s | {other:.2f} s | {other / mine:.2f} | {difference} |", flush=True)


def main() -> None:
    """Runs the load, or the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, metavar="DIR")
    parser.add_argument("--requests", type=int, default=24, metavar="N")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16], metavar="N")
    parser.add_argument("--turns", type=int, default=3, metavar="N")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="of the largest image")
    parser.add_argument("--ar-max-num-seqs", type=int, default=8, metavar="N")
    parser.add_argument("--dit-max-num-seqs", type=int, default=2, metavar="N")
    parser.add_argument("--official", metavar="CHECKOUT")
    parser.add_argument("--python", default=sys.executable, help="of the environment with torch")
    args = parser.parse_args()
    if args.official:
        against_official(args)
    else:
        mixed(args)


if __name__ == "__main__":
    main()
