"""Paged attention: is it right, and how fast is it, on the device that JAX finds.

    python benchmarks/attention.py [check] [time] [pool] [--backends tpu xla cudnn]

`check`: random ragged batches against float64, NaN wherever no token lives, and a sample of each problem that `time`
has against float32. `time`: on a GPU or TPU the kernel, XLA and, on a GPU, cuDNN at the sizes of BAGEL-7B-MoT; on a
CPU, XLA and the reference at small ones; against the floor, the larger of bytes over the rate of a copy and operations
over that of a large product. cuDNN does less: its keys are contiguous, without a mask, and the same each time, so that
a cache may hold them. `pool`: decoding with pools of 200 and of 4000 pages, which must take the same time. Backends
take turns; times are medians over the turns. Without a word: all three. Exit code 1 where a check fails.

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
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from pallas.ragged_batches import TOLERANCE, draw, draw_blocks, draw_decode  # noqa: E402

from bagel_jax.pallas.paged_attention import reference  # noqa: E402
from bagel_jax.pallas.paged_attention.api import BACKENDS, paged_attention, paged_blocks, paged_decode  # noqa: E402
from bagel_jax.pallas.paged_attention.pages import empty_pages  # noqa: E402

HEADS, KV_HEADS, WIDTH, PAGE = 28, 4, 128, 64  # of BAGEL-7B-MoT
TURNS = 5
PLATFORM = jax.default_backend()
KERNEL = {"gpu": "gpu", "tpu": "tpu"}.get(PLATFORM, "xla")
BACKENDS_HERE = {"gpu": ["gpu", "xla", "cudnn"], "tpu": ["tpu", "xla"]}.get(PLATFORM, ["xla", "reference"])
DTYPE = jnp.dtype("float32" if PLATFORM == "cpu" else "bfloat16")
RELATIVE = {"float32": 1e-5, "bfloat16": 1e-2}  # error of an output that is right
SAMPLE = 64  # queries of a problem that are held to the truth


# Is it right?


def say(name: str, errors: str, right: bool) -> bool:
    """A line about one case."""
    print(f"check  {name:48} {errors} {'ok' if right else 'WRONG'}", flush=True)
    return right


def distance(got, expected) -> float:
    """The largest error, relative where numbers are large."""
    return (np.abs(got - expected) / (1 + np.abs(expected))).max()


def check(name: str, batch, function, dtype: str, backend: str) -> bool:
    """One ragged batch against float64."""
    if backend != "reference" and not BACKENDS[backend].supports(*batch.arguments(dtype)[:2]):
        print(f"check  {name:48} left to XLA", flush=True)
        return True
    take = {paged_attention: batch.arguments, paged_blocks: batch.blocks, paged_decode: batch.decode}[function]
    arguments = take(dtype)
    out, lse = jax.jit(partial(function, backend=backend, return_lse=True))(*arguments)
    plain = jax.jit(partial(function, backend=backend))(*arguments).reshape(batch.q.shape)
    out, lse = out.reshape(batch.q.shape), lse.reshape(batch.q.shape[:2])
    real = slice(0, batch.query_offsets[-1])
    expected, expected_lse = (x[real] for x in batch.expected())
    seen = np.isfinite(expected_lse)
    lse = np.asarray(lse)[real]
    finite = bool(jnp.isfinite(out).all() & jnp.isfinite(plain).all())
    error = max(distance(np.asarray(x, np.float64)[real], expected) for x in (out, plain))
    lse_error = np.abs(lse[seen] - expected_lse[seen]).max()
    right = finite and max(error, lse_error) < TOLERANCE.get(dtype, 2e-2)
    return say(name, f"{error:.1e} lse {lse_error:.1e}", right and bool((np.isneginf(lse) == ~seen).all()))


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
        ("denoise, 4 rows", draw_blocks(5, [33, 0, 640, 7], [200, 129, 64, 0], 200, **sizes), paged_blocks),
        ("denoise, no context", draw_blocks(6, [0, 0], [128, 1], 128, **sizes), paged_blocks),
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


def compare(name: str, floor: float, calls: dict[str, Callable[[], Callable[[], float]]]) -> dict[str, float]:
    """Backends in turns; prints a line for each, with its time against the floor's and the first's; returns seconds."""
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
        line = f"{seconds * 1e6:11.1f} us, {seconds / floor:6.2f} of the floor, x{ratio:.2f}"
        print(f"time   {what:52} {line}", flush=True)
    return {"floor": floor, **medians}


class Problem(NamedTuple):
    """Queries at the ends of sequences over random pages."""

    name: str
    function: Callable  # `paged_decode`, `paged_attention` or `paged_blocks`
    lengths: list[int]  # keys of each row, those of its queries included
    queries: int = 1  # of each row
    causal: bool = False

    def arguments(self, pages) -> tuple:
        """Queries, page table and what else the function takes."""
        rows, total = len(self.lengths), len(self.lengths) * self.queries
        shape = {paged_decode: (rows,), paged_attention: (total,), paged_blocks: (rows, self.queries)}[self.function]
        ends, offsets = self.ends(), ()
        if self.function is paged_attention:
            offsets = (jnp.arange(rows + 1, dtype=jnp.int32) * self.queries,)
        else:
            ends = ends[:: self.queries]
        q = jax.random.normal(jax.random.key(total), (*shape, HEADS, WIDTH), DTYPE)
        return q, self.table(pages.shape[1]), *offsets, ends

    def ends(self) -> jax.Array:
        """What each query sees, `[R queries]`."""
        behind = np.arange(self.queries)[::-1] if self.causal else np.zeros(self.queries, int)
        return jnp.asarray((np.asarray(self.lengths)[:, None] - behind).reshape(-1), jnp.int32)

    def table(self, num_pages: int) -> jax.Array:
        """Pages of each row, anywhere in the pool."""
        rows, width = len(self.lengths), -(-max(self.lengths) // PAGE)
        numbers = np.random.default_rng(0).permutation(np.arange(1, num_pages))[: rows * width]
        return jnp.asarray(numbers.reshape(rows, width), jnp.int32)

    def call(self, backend: str) -> Callable:
        """The function of `arguments`, pages and layer."""
        return lambda q, pages, *others, layer: self.function(q, pages, layer, *others, backend=backend)

    @property
    def bytes(self) -> float:
        """Keys and values that must be read, and queries and outputs."""
        ends = 2 * len(self.lengths) * self.queries * HEADS
        return (sum(self.lengths) * KV_HEADS * 2 + ends) * WIDTH * DTYPE.itemsize

    @property
    def operations(self) -> float:
        """Multiplications and additions of its products."""
        return 4.0 * int(self.ends().sum()) * HEADS * WIDTH

    def floor(self, rates: dict[str, float]) -> float:
        """Seconds that no kernel can be under."""
        return max(self.bytes / rates["bytes"], self.operations / rates["operations"])


def problems() -> list[Problem]:
    """Those of the 7B model; on a CPU small ones."""
    sizes = [4098, 1024, 4902, 4096], [(1, 8192), (16, 8192), (64, 8192)], [4098, 9216, 30]
    if PLATFORM == "cpu":
        sizes = [66, 128, 258, 256], [(1, 512), (8, 1024)], [128, 300, 30]
    (vae, text, vit, long), decodes, contexts = sizes
    return [
        *(Problem(f"decode {rows} x {context}", paged_decode, [context] * rows) for rows, context in decodes),
        Problem(f"prefill {vae} over {text}", paged_attention, [vae + text], vae),
        Problem(f"prefill {vit} over 0", paged_attention, [vit], vit),
        Problem(f"prefill {long} over 0 causal", paged_attention, [long], long, causal=True),
        Problem(f"denoise {len(contexts)} x {vae} over {contexts}", paged_blocks, [c + vae for c in contexts], vae),
    ]


def make_pages(layers: int, count: int):
    """Random pages, made layer by layer, in little memory."""
    shape = empty_pages(1, count, KV_HEADS, PAGE, WIDTH, DTYPE).shape[1:]
    keys = jax.random.split(jax.random.key(0), layers)
    return jax.jit(lambda keys: jax.lax.map(lambda key: jax.random.normal(key, shape, DTYPE), keys))(keys)


def pages_for(some: list[Problem]):
    """Enough for each of the problems, and several layers of them."""
    most = max(len(p.lengths) * -(-max(p.lengths) // PAGE) for p in some)
    return make_pages(2 if PLATFORM == "cpu" else 4, most + 1)


def relative_error(problem: Problem, pages, backend: str) -> float:
    """Of a sample of the queries' outputs, against float32."""
    q, table, *others = problem.arguments(pages)
    out = jax.jit(partial(problem.call(backend), layer=1))(q, pages, table, *others)
    total = len(problem.lengths) * problem.queries
    some = np.sort(np.random.default_rng(1).permutation(total)[:SAMPLE])
    got, asked = (x.reshape(total, HEADS, WIDTH)[some] for x in (out, q))
    whose = jnp.asarray(some // problem.queries, jnp.int32)
    truth, _ = jax.jit(reference.attend)(asked, pages, jnp.int32(1), table, whose, problem.ends()[some])
    got, truth = (np.asarray(x, np.float64) for x in (got, truth))
    return float(np.linalg.norm(got - truth) / np.linalg.norm(truth))


def cudnn(problem: Problem) -> Callable[[], float]:
    """The timer of cuDNN's attention of the same size, all keys in one piece."""
    rows, length = len(problem.lengths), problem.lengths[0]
    keys = jax.random.normal(jax.random.key(2), (2, rows, length, KV_HEADS, WIDTH), DTYPE)
    q = jax.random.normal(jax.random.key(3), (rows, problem.queries, HEADS, WIDTH), DTYPE)

    def call(q, k, v, layer):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    return timer(call, q, *keys, layers=1)


def ours(problem: Problem, pages, backend: str) -> Callable[[], float]:
    """The timer of a backend."""
    q, *others = problem.arguments(pages)
    return timer(problem.call(backend), q, pages, *others, layers=pages.shape[0])


def measured_rates() -> dict[str, float]:
    """Bytes a second that a copy moves, operations a second of a large product: what the device reaches at best."""
    many, side = (2**26, 1024) if PLATFORM == "cpu" else (2**30, 8192)
    x = jnp.zeros(many // DTYPE.itemsize, DTYPE)
    a = jnp.ones((side, side), DTYPE)

    def spent(function, x) -> float:
        function, seconds = jax.jit(function, donate_argnums=0), []
        for _ in range(2 * TURNS):
            start = time.perf_counter()
            x = jax.block_until_ready(function(x))
            seconds.append(time.perf_counter() - start)
        return median(seconds)

    return {"bytes": 2 * many / spent(lambda x: x + 1, x), "operations": 2 * side**3 / spent(lambda a: a @ a, a)}


def time_all(backends: list[str]) -> dict[str, dict[str, float]]:
    """All problems with all of these; returns the numbers."""
    some, rates = problems(), measured_rates()
    pages, results = pages_for(some), {}
    print(f"time   copy {rates['bytes'] / 1e9:.0f} GB/s, product {rates['operations'] / 1e12:.3g} TFLOP/s", flush=True)
    for problem in some:
        calls = {name: partial(ours, problem, pages, name) for name in backends if name != "cudnn"}
        if "cudnn" in backends and not problem.causal and len(set(problem.lengths)) == 1:  # it knows no pages, no mask
            calls["cudnn"] = partial(cudnn, problem)
        results[problem.name] = compare(problem.name, problem.floor(rates), calls)
    return results


def check_problems(backend: str) -> dict[str, float]:
    """Each problem's relative error."""
    some = problems()
    pages, errors = pages_for(some), {}
    for problem in some:
        errors[problem.name] = error = relative_error(problem, pages, backend)
        say(f"{problem.name}, {backend}", f"{error:.1e}", error < RELATIVE[str(DTYPE)])
    return errors


def time_pools(backend: str) -> None:
    """Whether decoding depends on how large the pool is."""
    counts, problem = (200, 4000), Problem("decode 8 x 1024", paged_decode, [1024] * 8)
    timers = [ours(problem, make_pages(2, count), backend) for count in counts]
    small, large = (median(x) for x in zip(*[[once() for once in timers] for _ in range(TURNS)], strict=True))
    print(
        f"pool   {problem.name}, {backend}: {small * 1e6:.1f} us with {counts[0]} pages, {large * 1e6:.1f} us with "
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
    right = True
    if "check" in what:
        errors = check_problems(KERNEL)
        right = check_all(KERNEL) and max(errors.values()) < RELATIVE[str(DTYPE)]
    if "time" in what:
        time_all(args.backends)
    if "pool" in what:
        time_pools(KERNEL)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
