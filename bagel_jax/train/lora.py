"""Low-rank adapters: W + (alpha / rank) A B in place of W, with A and B learned.

Source: LoRA, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bagel_jax.train.config import LoraTable


def adapted(lora: LoraTable) -> list[str]:
    """Paths of the parameters that get an adapter."""
    return [f"trunk.layers.{expert}.{name}.kernel" for expert in lora.experts for name in lora.projections]


def init_adapters(lora: LoraTable, kernels: dict[str, jax.Array], seed: int) -> dict[str, jax.Array]:
    """New adapters that change nothing yet: A random, B zero.

    Args:
        lora: which, and of what rank.
        kernels: parameters by path, `[L, in, out]` where adapted.
        seed: of A.

    Returns:
        `{path}.lora_a` `[L, in, rank]` and `{path}.lora_b` `[L, rank, out]`, float32.
    """
    out = {}
    for i, path in enumerate(adapted(lora)):
        layers, width_in, width_out = kernels[path].shape
        key = jax.random.fold_in(jax.random.key(seed), i)
        out[f"{path}.lora_a"] = jax.random.normal(key, (layers, width_in, lora.rank)) * width_in**-0.5
        out[f"{path}.lora_b"] = jnp.zeros((layers, lora.rank, width_out))
    return out


def merge_adapters(lora: LoraTable, params: dict[str, jax.Array], adapters: dict[str, jax.Array]) -> dict:
    """`params` with every adapter added to its weight; the adapters are not needed any more."""
    merged = dict(params)
    for path in adapted(lora):
        a, b = adapters[f"{path}.lora_a"], adapters[f"{path}.lora_b"]
        change = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST) * (lora.alpha / lora.rank)
        merged[path] = (params[path].astype(jnp.float32) + change).astype(params[path].dtype)
    return merged
