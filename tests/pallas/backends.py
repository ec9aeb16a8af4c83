"""The backends of paged attention that run on a CPU, and one of them held to the truth."""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as gpu_interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from pallas.ragged_batches import TOLERANCE, Batch

from bagel_jax.pallas.paged_attention import gpu, tpu
from bagel_jax.pallas.paged_attention.api import BACKENDS, paged_attention, paged_blocks, paged_decode
from bagel_jax.pallas.paged_attention.tiles import Tiling

BACKENDS["tpu-races"] = tpu.backend(interpret=pltpu.InterpretParams(detect_races=True))

# Each of a block's three warpgroups waits in a thread of XLA's CPU client, and so does what started them.
_THREADS = 6
NO_GPU_INTERPRETER = ""
if not hasattr(plgpu, "InterpretGPUParams"):
    NO_GPU_INTERPRETER = (
        f"the Mosaic GPU interpreter of jax {jax.__version__} has no layout_cast, no transposed operand"
    )
elif int(os.environ.get("PJRT_NPROC", os.cpu_count() or 1)) < _THREADS:
    NO_GPU_INTERPRETER = f"the Mosaic GPU interpreter would hang with fewer than {_THREADS} threads; set PJRT_NPROC"
else:
    # As many splits as processors would take minutes.
    BACKENDS["gpu-interpret"] = gpu.backend(interpret=plgpu.InterpretGPUParams(detect_races=True))._replace(
        decode_tiling=lambda q, pages: Tiling(1, rows=8, splits=2)
    )


def on_gpu(*values, slow: bool = False):
    """A parameter of a test for the Mosaic GPU interpreter."""
    marks = [pytest.mark.skipif(bool(NO_GPU_INTERPRETER), reason=NO_GPU_INTERPRETER), *[pytest.mark.slow] * slow]
    return pytest.param("gpu-interpret", *values, marks=marks)


@functools.cache  # a new jit would compile anew
def compiled(function, backend: str):
    """One entry of the API, jitted, with the log-sum-exp."""
    return jax.jit(functools.partial(function, backend=backend, return_lse=True))


def check(backend: str, batch: Batch, dtype: str = "float32", function=paged_attention) -> None:
    """One backend's output and log-sum-exp, for every real query."""
    if backend != "reference":  # else what falls back to XLA would pass
        assert BACKENDS[backend].supports(*batch.arguments(dtype)[:2])
    take = {paged_attention: batch.arguments, paged_blocks: batch.blocks, paged_decode: batch.decode}[function]
    out, lse = (np.asarray(x) for x in compiled(function, backend)(*take(dtype)))
    out, lse = out.reshape(batch.q.shape), lse.reshape(batch.q.shape[:2])
    expected, expected_lse = batch.expected()
    real = slice(0, batch.query_offsets[-1])
    np.testing.assert_array_equal(np.isneginf(lse[real]), np.isneginf(expected_lse[real]))
    close(out[real], expected[real], dtype)
    seen = np.isfinite(expected_lse[real])
    close(lse[real][seen], expected_lse[real][seen], dtype)
    assert np.isfinite(out).all(), "padding is not finite"
    no_races(backend)


def close(got, expected, dtype: str) -> None:
    """Within the tolerance of the type."""
    np.testing.assert_allclose(jnp.asarray(got, jnp.float32), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def no_races(backend: str) -> None:
    """The interpreters only print what races they find."""
    if backend == "tpu-races":
        assert not tpu_interpreter.races.races_found
    if backend == "gpu-interpret":
        assert not gpu_interpreter.get_races().races_found
