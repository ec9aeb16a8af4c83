"""Compiles one program, in a process of its own, for a compiler may end it: `python -m bagel_jax.aot.one '[...]' NAME`.

What came of it is the last line, as json.
"""

from __future__ import annotations

import json
import sys
import time

from bagel_jax.aot.targets import SLICES, TARGETS, devices


def main(target: str, mesh: list[int], dtype: str, size: int, name: str) -> dict:
    """Compiles a program of `programs.Model`.

    Args:
        target: one of `SLICES`.
        mesh: devices along data, sequence and tensor.
        dtype: of weights, keys and values.
        size: see `Model`.
        name: of the program; empty: only says which there are.

    Returns:
        `names`, `weights`, `pages` (bytes of a device), `num_pages`, and of the program `seconds`, `arguments`,
        `temporary`, `flops`, `kv`, `exchanges`.
    """
    chip, count, topology = SLICES[target]
    found = devices(chip, TARGETS[chip], topology)[:count]

    from bagel_jax.aot.cost import exchanges, matmul_flops
    from bagel_jax.aot.programs import Model
    from bagel_jax.aot.published import PUBLISHED
    from bagel_jax.placement.placement import Placement

    model = Model(Placement.over(found, PUBLISHED.trunk.num_kv_heads, *mesh), dtype, size)
    programs = {program.name: program for program in model.programs()}
    said = {"names": list(programs), "weights": model.weight_bytes, "pages": model.page_bytes}
    said["num_pages"] = model.num_pages
    if not name:
        return said
    program = programs[name]
    start = time.perf_counter()
    traced = program.trace()
    lowered = traced.lower(lowering_platforms=(TARGETS[chip].platform,))
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    once, all_of_it = (matmul_flops(traced.jaxpr.jaxpr, loops=loops) for loops in (False, True))
    # A device's part of the operations is the compiler's, who counts a loop's body once.
    of_device = cost.get("flops", 0)
    flops = of_device * all_of_it / once if of_device > 0 and once else all_of_it / count
    return said | {
        "seconds": seconds,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "flops": flops + program.attention_flops,
        "all_flops": all_of_it,
        "kv": program.kv_bytes,
        "exchanges": exchanges(compiled.as_text()) if count > 1 else [],
    }


if __name__ == "__main__":
    print(json.dumps(main(*json.loads(sys.argv[1]), sys.argv[2])))
