"""Paged attention: is it right, and how fast is it, on the device that JAX finds.

    python benchmarks/attention.py [check] [time] [pool] [--backends tpu xla cudnn]

`check`: random ragged batches against float64, NaN wherever no token lives. `time`: on a GPU or TPU the kernel, XLA
and, on a GPU, cuDNN at the sizes of BAGEL-7B-MoT; on a CPU, XLA and the reference at small ones. cuDNN does less: its
keys are contiguous, without a mask, and the same each time, so that a cache may hold them. `pool`: decoding with pools
of 200 and of 4000 pages, which must take the same time. Backends take turns; times are medians over the turns. Without
a word: all three. Exit code 1 where a check fails.

Needs only JAX, NumPy, Pillow and this repository: `tests/` holds the random batches.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from pallas.ragged_batches import TOLERANCE, draw, draw_blocks, draw_decode  # noqa: E402

from bagel_jax.pallas.paged_attention.api import BACKENDS, paged_attention, paged_blocks, paged_decode  # noqa: E402
from bagel_jax.pallas.paged_attention.pages import empty_pages  # noqa: E402

HEADS, KV_HEADS, WIDTH, PAGE = 28, 4, 128, 64  # of BAGEL-7B-MoT
TURNS = 5
PLATFORM = jax.default_backend()
KERNEL = {"gpu": "gpu", "tpu": "tpu"}.get(PLATFORM, "xla")
BACKENDS_HERE = {"gpu": ["gpu", "xla", "cudnn"], "tpu": ["tpu", "xla"]}.get(PLATFORM, ["xla", "reference"])
DTYPE = jnp.dtype("float32" if PLATFORM == "cpu" else "bfloat16")


# Is it right?


def say(name: str, error: float, lse_error: float, right: bool) -> bool:
    """A line about one case."""
    print(f"check  {name:44} {error:.1e} lse {lse_error:.1e} {'ok' if right else 'WRONG'}", flush=True)
    return right


def distance(got, expected) -> float:
    """The largest error, relative where numbers are large."""
    return (np.abs(got - expected) / (1 + np.abs(expected))).max()


def check(name: str, batch, function, dtype: str, backend: str) -> bool:
    """One ragged batch against float64."""
    arguments = batch.arguments(dtype)
    if backend != "reference" and not BACKENDS[backend].supports(*arguments[:2]):
        print(f"check  {name:44} left to XLA", flush=True)
        return True
    if function is paged_decode:
        arguments = (*arguments[:4], arguments[5])
    out, lse = jax.jit(partial(function, backend=backend, return_lse=True))(*arguments)
    plain = jax.jit(partial(function, backend=backend))(*arguments)
    real = slice(0, batch.query_offsets[-1])
    expected, expected_lse = (x[real] for x in batch.expected())
    seen = np.isfinite(expected_lse)
    lse = np.asarray(lse)[real]
    finite = bool(jnp.isfinite(out).all() & jnp.isfinite(plain).all())
    error = max(distance(np.asarray(x, np.float64)[real], expected) for x in (out, plain))
    lse_error = np.abs(lse[seen] - expected_lse[seen]).max()
    right = finite and max(error, lse_error) < TOLERANCE.get(dtype, 2e-2)
    return say(name, error, lse_error, right and bool((np.isneginf(lse) == ~seen).all()))


def check_all(backend: str) -> bool:
    """Shapes, pages, lengths on and beside their borders, empty contexts."""
    right = []
    dtype = str(DTYPE)
    for width, page in itertools.product((64, 128), (16, 32, 64, 128)):
        sizes = {"heads": 14, "kv_heads": 2, "width": width, "page": page, "dtype": dtype}
        lengths = [1, page - 1, page, page + 1, 2 * page, 5, 3 * page + 7]
        name = f"E {width} page {page}, {backend}"
        right.append(check(f"ragged {name}", draw(page, lengths, **sizes), paged_attention, dtype, backend))
        lengths = [1, page - 1, 0, page, page + 1, 5 * page + 3, 0, 8 * page]
        right.append(check(f"decode {name}", draw_decode(page, lengths, **sizes), paged_decode, dtype, backend))
    sizes = {"heads": 4, "kv_heads": 1, "width": 128, "page": 64, "dtype": dtype}
    others = [
        ("long, all queries", draw(7, [700, 300], [700, 300], **sizes), paged_attention),
        ("long, last queries", draw(8, [1500, 64, 1100], [130, 64, 1], **sizes), paged_attention),
        ("denoise, 4 rows", draw_blocks(5, [33, 0, 640, 7], [200, 129, 64, 0], 200, **sizes), paged_attention),
        ("denoise, no context", draw_blocks(6, [0, 0], [128, 1], 128, **sizes), paged_attention),
        ("decode, long", draw_decode(10, [3000, 2049, 1], **sizes), paged_decode),
        ("decode, G 1", draw_decode(11, [300] * 40, width=64, heads=2, dtype=dtype), paged_decode),
    ]
    right += [check(f"{name}, {backend}", batch, function, dtype, backend) for name, batch, function in others]
    if PLATFORM == "gpu":
        half = draw(9, [300, 65], dtype="float16", width=64, page=32)
        right.append(check(f"float16, {backend}", half, paged_attention, "float16", backend))
    return all(right)


# How fast is it?


def timer(function: Callable, q, *arguments, layers: int) -> Callable[[], float]:
    """A function that gives the seconds of one call, from several in one program, each on another layer.

    So neither the start of a program counts, nor does a cache hold the keys.
    """

    @jax.jit
    def many(times, q, *arguments):
        def one(i, q):
            out = jax.lax.optimization_barrier(function(q, *arguments, layer=i % layers))
            first = (0,) * q.ndim
            return q.at[first].set(out[first].astype(q.dtype))

        return jax.lax.fori_loop(0, times, one, q)

    def seconds(times):
        start = time.perf_counter()
        many(jnp.int32(times), q, *arguments).block_until_ready()
        return (time.perf_counter() - start) / times

    seconds(1)
    times = int(min(200, max(1, 0.1 / seconds(1))))
    return lambda: seconds(times)


def compare(name: str, amount: float, unit: str, calls: dict[str, Callable[[], Callable[[], float]]]) -> None:
    """Backends in turns; prints a line for each, with its time against the first's."""
    timers = {}
    for backend, start in calls.items():
        try:
            timers[backend] = start()
        except Exception as error:  # the others go on
            print(f"time   {name}, {backend}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    taken = {backend: [] for backend in timers}
    for _ in range(TURNS):
        for backend, once in timers.items():
            taken[backend].append(once())
    medians = {backend: median(seconds) for backend, seconds in taken.items()}
    for backend, seconds in medians.items():
        ratio = seconds / next(iter(medians.values()))
        what = f"{name}, {backend}"
        print(f"time   {what:48} {seconds * 1e6:11.1f} us {amount / seconds:9.4g} {unit} x{ratio:.2f}", flush=True)


def normal(*shape):
    """Random numbers."""
    return jax.random.normal(jax.random.key(sum(shape)), shape, DTYPE)


def make_pages(layers: int, count: int):
    """Random pages, made layer by layer, in little memory."""
    shape = empty_pages(1, count, KV_HEADS, PAGE, WIDTH, DTYPE).shape[1:]
    keys = jax.random.split(jax.random.key(0), layers)
    return jax.jit(lambda keys: jax.lax.map(lambda key: jax.random.normal(key, shape, DTYPE), keys))(keys)


def random_table(pages, rows: int, context: int):
    """Pages of each row, anywhere in the pool."""
    count = -(-context // PAGE)
    numbers = np.random.default_rng(0).permutation(np.arange(1, pages.shape[1]))[: rows * count]
    return jnp.asarray(numbers.reshape(rows, count), jnp.int32)


def cudnn(q, k, v, layer):
    """Attention of the same size by cuDNN."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def dense(rows: int, length: int):
    """Contiguous keys and values for cuDNN."""
    return normal(rows, length, KV_HEADS, WIDTH), normal(rows, length, KV_HEADS, WIDTH) * 0.5


def decode(rows: int, context: int, pages, backend: str) -> Callable[[], float]:
    """The timer of one query a row over `context` keys each."""
    q = normal(rows, HEADS, WIDTH)
    if backend == "cudnn":
        return timer(cudnn, q[:, None], *dense(rows, context), layers=1)

    def call(q, pages, table, ends, layer):
        return paged_decode(q, pages, layer, table, ends, backend=backend)

    ends = jnp.full((rows,), context, jnp.int32)
    return timer(call, q, pages, random_table(pages, rows, context), ends, layers=pages.shape[0])


def prefill(queries: int, context: int, causal: bool, pages, backend: str) -> Callable[[], float]:
    """The timer of one block of queries that see `context` keys and each other."""
    q, length = normal(queries, HEADS, WIDTH), context + queries
    if backend == "cudnn":
        return timer(cudnn, q[None], *dense(1, length), layers=1)

    def call(q, pages, table, ends, layer):
        return paged_attention(q, pages, layer, table, jnp.asarray([0, queries], jnp.int32), ends, backend=backend)

    ends = jnp.arange(context, length) + 1 if causal else jnp.full((queries,), length)
    return timer(call, q, pages, random_table(pages, 1, length), ends.astype(jnp.int32), layers=pages.shape[0])


def denoise(queries: int, contexts: list[int], pages, backend: str) -> Callable[[], float]:
    """The timer of stage 1: a block of queries for each of these contexts, which see it and each other."""
    rows = len(contexts)

    def call(q, pages, table, ends, layer):
        return paged_blocks(q, pages, layer, table, ends, backend=backend)

    table = random_table(pages, rows, max(contexts) + queries)
    ends = jnp.asarray(contexts, jnp.int32) + queries
    return timer(call, normal(rows, queries, HEADS, WIDTH), pages, table, ends, layers=pages.shape[0])


def time_all(backends: list[str]) -> None:
    """All sizes with all of these."""
    if PLATFORM == "cpu":
        decodes, blocks = [(1, 512), (8, 1024)], [(66, 128, False), (258, 512, False), (256, 0, True)]
        edit, pages = (130, [128, 300, 30]), make_pages(2, 200)
    else:
        decodes = [(1, 8192), (16, 8192), (64, 8192)]
        blocks = [(4098, 1024, False), (4902, 0, False), (4096, 0, True)]
        edit, pages = (4098, [4098, 9216, 30]), make_pages(4, 8300)

    def calls(make, *sizes, without=()):
        return {name: partial(make, *sizes, pages, name) for name in backends if name not in without}

    for rows, context in decodes:
        amount = rows * context * KV_HEADS * 2 * WIDTH * DTYPE.itemsize / 1e9
        compare(f"decode {rows} x {context}", amount, "GB/s", calls(decode, rows, context))
    for queries, context, causal in blocks:
        pairs = queries * (context + queries) - (queries * (queries - 1) // 2 if causal else 0)
        without = ["cudnn"] * causal  # it would see what a text may not
        name = f"prefill {queries} over {context}{' causal' * causal}"
        some = calls(prefill, queries, context, causal, without=without)
        compare(name, 4 * pairs * HEADS * WIDTH / 1e12, "TFLOP/s", some)
    queries, contexts = edit
    amount = 4 * queries * (len(contexts) * queries + sum(contexts)) * HEADS * WIDTH / 1e12
    some = calls(denoise, queries, contexts, without=["cudnn"])  # it knows no pages
    compare(f"denoise {len(contexts)} x {queries} over {contexts}", amount, "TFLOP/s", some)


def time_pools(backend: str) -> None:
    """Whether decoding depends on how large the pool is."""
    counts = 200, 4000
    timers = [decode(8, 1024, make_pages(2, count), backend) for count in counts]
    small, large = (median(x) for x in zip(*[[once() for once in timers] for _ in range(TURNS)], strict=True))
    print(
        f"pool   decode 8 x 1024, {backend}: {small * 1e6:.1f} us with {counts[0]} pages, {large * 1e6:.1f} us with "
        f"{counts[1]} (x{large / small:.2f})",
        flush=True,
    )


def main() -> int:
    """Runs the command line; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", nargs="*", metavar="{check,time,pool}")
    p.add_argument("--backends", nargs="+", default=BACKENDS_HERE, help="to time (default: %(default)s)")
    args = p.parse_args()
    if unknown := set(args.what) - {"check", "time", "pool"}:
        p.error(f"{', '.join(sorted(unknown))} is not one of check, time, pool")
    if unknown := set(args.backends) - {*BACKENDS, "reference", "cudnn"}:
        p.error(f"--backends {', '.join(sorted(unknown))} is not one of {', '.join(BACKENDS)}, reference, cudnn")
    what = args.what or ["check", "time", "pool"]
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {DTYPE}, kernel: {KERNEL}", flush=True)
    right = "check" not in what or check_all(KERNEL)
    if "time" in what:
        time_all(args.backends)
    if "pool" in what:
        time_pools(KERNEL)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
