"""BAGEL-7B on one GPU, with random weights: what kernels, images, texts and a load of requests take.

    python benchmarks/gpu/measure.py kernels images evaluations text load batch [--out FILE.json]

Parts can be given one by one, where a call may not last as long as all of them. Seconds are medians over runs after a
first one that compiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import jax
import numpy as np
from model import ROOT, random_bagel
from PIL import Image
from profiling import profile

from bagel_jax.batch.job import Defaults, Job
from bagel_jax.batch.output import JobFolder
from bagel_jax.batch.sources import JsonLines
from bagel_jax.batch.worker import Worker
from bagel_jax.request import Request

sys.path.append(str(ROOT / "benchmarks"))
import attention
from engine import serve

PEAK = {"H100": 989e12, "H200": 989e12}  # dense bfloat16 operations a second, by the vendor's data sheet
PROMPT = "a red bench below a blue clock in a green garden, with a small dog beside it, late in the afternoon"
GIB = 2**30


CASES = [
    ("text2img 1024, 50 steps", "text2img", 1024, {"steps": 50}),
    ("img2img 1024, 50 steps", "img2img", 1024, {"steps": 50}),
    ("text2img 512, 20 steps", "text2img", 512, {"steps": 20}),
    ("img2img 512, 20 steps", "img2img", 512, {"steps": 20}),
    ("TaylorSeer, text2img 1024, 50 steps", "text2img", 1024, {"steps": 50, "taylorseer": True}),
    ("TaylorSeer, img2img 1024, 50 steps", "img2img", 1024, {"steps": 50, "taylorseer": True}),
]


def random_image(size: int, seed: int = 0) -> Image.Image:
    """Random pixels."""
    pixels = np.random.RandomState(seed).randint(0, 256, (size, size, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def step_operations(config, tokens: int, contexts: list[int]) -> float:
    """Operations of one evaluation with a row for each context, of so many tokens before the image's block."""
    c = config.trunk
    projections = c.hidden_size * c.num_heads * c.head_dim * 2 + 2 * c.hidden_size * c.num_kv_heads * c.head_dim
    weights = c.num_layers * (projections + 3 * c.hidden_size * c.mlp_width)
    scores = sum(4 * tokens * (tokens + 2 + s) * c.num_heads * c.head_dim * c.num_layers for s in contexts)
    return 2 * weights * tokens * len(contexts) + scores


def memory() -> str:
    """Peak of the device's memory so far."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return f"{stats['peak_bytes_in_use'] / GIB:.1f} GiB" if "peak_bytes_in_use" in stats else "not known"


def device() -> dict[str, str]:
    """What the numbers were measured on."""
    kind = jax.local_devices()[0].device_kind
    return {"device": kind, "jax": jax.__version__, "python": platform.python_version()}


def kernels() -> dict:
    """Every kernel at the model's shapes: its error, and its time against the floor, XLA and cuDNN."""
    errors = attention.check_problems(attention.KERNEL)
    seconds = attention.time_all(attention.BACKENDS_HERE)
    return {name: {"relative_error": error, **seconds[name]} for name, error in errors.items()}


def forget(model) -> None:
    """Empties the prefix cache, once the engine's threads have ended."""
    model.close()
    model.engine.engine.context.store.prefixes.clear()


def images(model, args) -> dict:
    """text2img and img2img, alone on the machine."""
    results = {}
    for name, modality, size, settings in CASES:
        if args.cases and not any(name.startswith(prefix) for prefix in args.cases):
            continue
        place = {"height": size, "width": size} if modality == "text2img" else {"image": random_image(size)}

        def run(modality=modality, place=place, **settings):
            started = time.perf_counter()
            result = model.generate(modality, PROMPT, **place, **settings)
            return {"total": time.perf_counter() - started, **result.seconds}

        first = run(**settings | {"steps": 9})
        print(f"{name}: compiling took {first['compile']:.1f} s", flush=True)
        forget(model)
        runs = []
        for _ in range(args.runs):
            runs.append(run(**settings))
            forget(model)
        seconds = {phase: median(r[phase] for r in runs) for phase in runs[0] if phase not in ("load", "compile")}
        line = ", ".join(f"{phase} {value:.3f}" for phase, value in seconds.items())
        print(f"{name}: {line}; peak memory so far {memory()}", flush=True)
        results[name] = seconds
    return results


def evaluations(model, args) -> dict:
    """One guided evaluation at 1024², and how much of the chip's peak it reaches."""
    results, tokens = {}, 64 * 64
    peak = next((value for key, value in PEAK.items() if key in device()["device"]), float("nan"))
    for modality, contexts in (("text2img", [30, 0]), ("img2img", [9030, 9000, 30])):
        stepping(model, modality, 2)
        short, long = stepping(model, modality, 2), stepping(model, modality, 12)
        spent = (long - short) / 10
        share = step_operations(model.config, tokens, contexts) / spent / peak
        rows = f"evaluation of {modality}, {len(contexts)} rows"
        print(f"{rows}: {1e3 * spent:.1f} ms, MFU {100 * share:.1f} %", flush=True)
        results[rows] = {"seconds": spent, "mfu": share}
        if args.profile:
            profile(lambda modality=modality: stepping(model, modality, 2))
    return results


def stepping(model, modality: str, evaluations: int) -> float:
    """Seconds of so many guided evaluations at 1024²."""
    place = {"height": 1024, "width": 1024} if modality == "text2img" else {"image": random_image(1024)}
    result = model.generate(modality, PROMPT, **place, steps=evaluations + 1, cfg_interval=(0.0, 1.0))
    return result.seconds["denoise"]


def text(model, args) -> dict:
    """img2text: time to first token, and tokens a second at several batch sizes."""
    results = {}
    for batch in (1, 4, 16, 64):
        runs = []
        for turn in range(1 + args.runs):
            requests = [
                Request.create("img2text", PROMPT, random_image(512, 1000 * turn + i), max_tokens=129, seed=i)
                for i in range(batch)
            ]
            started = time.perf_counter()
            answers = [result for _, result in model.run_many(requests)]
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
            spent = time.perf_counter() - started
            decoding = median(answer.tokens_per_second for answer in answers)
            first = min(answer.time_to_first_token for answer in answers)
            runs.append((decoding * batch, first, spent))
        rate, first, spent = (median(column) for column in zip(*runs[1:], strict=True))
        print(f"img2text, batch {batch}: first token {first:.3f} s, {rate:.0f} tokens/s, all {spent:.2f} s", flush=True)
        results[f"batch {batch}"] = {"time_to_first_token": first, "tokens_per_second": rate, "seconds": spent}
    large = [
        model.generate("img2text", PROMPT, random_image(980, i), max_tokens=9).time_to_first_token for i in range(4)
    ]
    print(f"img2text, an image of 980 x 980: first token {median(large[1:]):.3f} s; peak memory {memory()}", flush=True)
    results["image of 980"] = {"time_to_first_token": median(large[1:])}
    if args.profile:
        one = Request.create("img2text", PROMPT, random_image(512), max_tokens=17)
        profile(lambda: model.run(one).text)
    return results


def load(model, args) -> dict:
    """text2img 512², 20 steps, so many requests at a time."""
    results = {}

    def some(count: int) -> list[Request]:
        place = {"height": 512, "width": 512}
        return [Request.create("text2img", f"{PROMPT} {i}", seed=i, steps=20, **place) for i in range(count)]

    for concurrency in (1, 4, 16):
        count = max(8, 2 * concurrency)
        serve(model, some(count), concurrency)  # compiles
        spent, latencies = serve(model, some(count), concurrency)
        p50, p95 = np.percentile(latencies, (50, 95))
        print(
            f"concurrency {concurrency}: {count / spent:.2f} requests/s, p50 {p50:.2f} s, p95 {p95:.2f} s", flush=True
        )
        results[f"concurrency {concurrency}"] = {"requests_per_second": count / spent, "p50": p50, "p95": p95}
    return results


def batch(model, args) -> dict:
    """A batch job of text2img 512², 20 steps, against the same requests without one, alternately."""
    count, spent = 32, {"engine": [], "batch job": []}
    fields = {"modality": "text2img", "height": 512, "width": 512, "steps": 20}
    for turn in range(2 * args.runs + 2):
        lines = [{**fields, "prompt": f"{PROMPT} {turn} {i}", "seed": i} for i in range(count)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "job.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            started = time.perf_counter()
            if turn % 2:
                output = JobFolder(Path(folder) / "out", {"job": turn})
                Worker(Job(JsonLines(path)), output, 8, Defaults()).run(model.run_many)
            else:
                for _, result in model.run_many(Request.from_json(line, Path(folder)) for line in lines):
                    if isinstance(result, Exception):
                        raise result
            seconds = time.perf_counter() - started
        if turn > 1:  # the first ones compile
            spent[("engine", "batch job")[turn % 2]].append(seconds)
    rates = {name: count / median(seconds) for name, seconds in spent.items()}
    print(", ".join(f"{name} {rate:.3f} requests/s" for name, rate in rates.items()), flush=True)
    print(f"a batch job is {rates['batch job'] / rates['engine']:.3f} times as fast", flush=True)
    return rates


def main() -> None:
    """Runs the parts."""
    parts = {"images": images, "evaluations": evaluations, "text": text, "load": load, "batch": batch}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["kernels", *parts])
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="only images whose names begin so")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="after the first one")
    parser.add_argument("--profile", action="store_true", help="print the busiest kernels too")
    parser.add_argument("--out", metavar="FILE", help="write the numbers as json")
    args = parser.parse_args()
    model, results = None, device()
    for part in sorted(args.parts, key="kernels".__ne__):  # those first, while the memory is free
        if part == "kernels":
            results[part] = kernels()
        else:
            model = model or random_bagel(ar_max_num_seqs=64, dit_max_num_seqs=4)
            results[part] = parts[part](model, args)
        if args.out:
            with open(args.out, "w", encoding="utf-8") as file:
                json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
