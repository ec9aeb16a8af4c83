"""Compiles each kernel at the sizes of the published model, and says what fast memory it needs.

- VMEM: what the TPU compiler says it used for the kernel (`used_scoped_memory_configs` of the custom call).
- shared memory: the dynamic shared memory that the compiled kernel is launched with, a block of threads. ptxas does not
  know it; it stands in the launch that Mosaic GPU made.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from bagel_jax.aot.targets import TARGETS, Target, devices
from bagel_jax.command import DONE, FAILED

# Sizes of BAGEL-7B-MoT's trunk (`llm_config.json` of ByteDance-Seed/BAGEL-7B-MoT), and a pool of KV pages.
_LAYERS, _HEADS, _KV_HEADS, _WIDTH = 28, 28, 4, 128
_PAGES, _PAGE = 2048, 64
_VAE_BLOCK, _VIT_BLOCK = 4098, 4902  # tokens of a 1024 x 1024 image, and the most that the ViT gives
_CONTEXTS = (4098, 9216, 30)  # of the three rows of an edit


class Case(NamedTuple):
    """Something to compile."""

    name: str
    sizes: str
    calls: int  # of kernels in it
    function: Callable
    arguments: tuple  # of jax.ShapeDtypeStruct


def kernels(name: str) -> int:
    """Compiles all for a target, a line each; returns the exit code."""
    target = TARGETS[name]
    device = devices(name, target)[0]
    code = DONE
    for case in _cases(target.backend):
        line = f"{case.name:18} {case.sizes:42} {name:4}"
        start = time.perf_counter()
        try:
            memory = _compile(case, target, device)
        # Whatever is wrong with one kernel, the others go on.
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"{line} FAILED: {reason[:500]}", flush=True)
            code = FAILED
        else:
            print(f"{line} {time.perf_counter() - start:6.1f} s  {target.memory} {memory / 2**10:,.0f} KiB", flush=True)
    return code


def _cases(backend: str) -> list[Case]:
    import jax
    import jax.numpy as jnp

    from bagel_jax.pallas.paged_attention.api import paged_attention, paged_blocks, paged_decode

    def of(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    numbers = partial(of, dtype=jnp.int32)
    pages = of(_LAYERS, _PAGES, _KV_HEADS, 2, _PAGE, _WIDTH), numbers()

    def table(rows, context):
        return numbers(rows, -(-context // _PAGE))

    cases = []
    for rows in (1, 16, 64):
        arguments = of(rows, _HEADS, _WIDTH), *pages, table(rows, 8192), numbers(rows)
        cases.append(Case("paged_decode", f"{rows} rows over 8192", 1, paged_decode, arguments))
    for what, length in (("VAE", _VAE_BLOCK), ("ViT", _VIT_BLOCK)):
        arguments = of(length, _HEADS, _WIDTH), *pages, table(1, 1024 + length), numbers(2), numbers(length)
        cases.append(
            Case("paged_attention", f"{what} block of {length} over text of 1024", 1, paged_attention, arguments)
        )
    rows, longest = len(_CONTEXTS), max(_CONTEXTS) + _VAE_BLOCK
    arguments = of(rows, _VAE_BLOCK, _HEADS, _WIDTH), *pages, table(rows, longest), numbers(rows)
    contexts = ", ".join(map(str, _CONTEXTS))
    cases.append(Case("paged_blocks", f"{rows} blocks of {_VAE_BLOCK} over {contexts}", 1, paged_blocks, arguments))
    return [case._replace(function=partial(case.function, backend=backend)) for case in cases]


def _compile(case: Case, target: Target, device: Any) -> int:
    """Bytes of fast memory of the largest kernel in the compiled program; raises if one is missing there."""
    import jax

    placed = jax.sharding.SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed) for x in case.arguments]
    lowered = jax.jit(case.function).trace(*arguments).lower(lowering_platforms=(target.platform,))
    asked = lowered.as_text().count(f"@{target.call}")
    # Not as text: what a newer libtpu says there, JAX may be unable to read.
    program = lowered.compile().runtime_executable().serialize()
    if asked != case.calls or target.call.encode() not in program:
        raise RuntimeError(f"{asked} kernels are in the program instead of {case.calls}; XLA does the rest")
    return max(_vmem(program) if target.platform == "tpu" else _shared_memory(lowered))


def _vmem(program: bytes) -> list[int]:
    pattern = rb'"custom_call_config":\{[^{}]*\},"used_scoped_memory_configs":\[\{[^{}]*"size":"(\d+)"'
    return [int(size) for size in re.findall(pattern, program)]


def _shared_memory(lowered: Any) -> list[int]:
    from jax.extend.mlir import ir
    from jax.interpreters.mlir import make_ir_context

    def named(module, name):
        found = []

        def visit(operation):
            if operation.name == name:
                found.append(operation)
            return ir.WalkResult.ADVANCE

        module.operation.walk(visit)
        return found

    sizes = []
    for call in named(lowered.compiler_ir("stablehlo"), "stablehlo.custom_call"):
        if "mosaic_gpu" not in str(call.attributes["call_target_name"]):
            continue
        with make_ir_context() as context:
            context.allow_unregistered_dialects = True
            kernel = ir.Module.parse(call.attributes["mhlo.backend_config"]["module"].value_bytes)
            for launch in named(kernel, "stable_mosaic_gpu.gpu.launch"):
                # Before it: what to wait for, and three sizes each of grid, block and cluster.
                place = sum(list(launch.attributes["operandSegmentSizes"])[:10])
                sizes.append(launch.operands[place].owner.attributes["value"].value)
    return sizes
