"""Low-rank adapters: W + (alpha / rank) A B in place of W, with A and B learned.

Source: LoRA, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import math

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
        kernels: parameters by path, `[L, *in, *out]` where adapted: a side that is heads has two axes.
        seed: of A.

    Returns:
        `{path}.lora_a` `[L, *in, rank]` and `{path}.lora_b` `[L, rank, *out]`, float32.
    """
    out = {}
    for i, path in enumerate(adapted(lora)):
        layers, *widths = kernels[path].shape
        first_out = 2 if path.endswith(".o.kernel") else 1  # o takes heads, q, k and v give them
        widths_in, widths_out = widths[:first_out], widths[first_out:]
        key = jax.random.fold_in(jax.random.key(seed), i)
        a = jax.random.normal(key, (layers, *widths_in, lora.rank)) * math.prod(widths_in) ** -0.5
        out[f"{path}.lora_a"], out[f"{path}.lora_b"] = a, jnp.zeros((layers, lora.rank, *widths_out))
    return out


def merge_adapters(lora: LoraTable, params: dict[str, jax.Array], adapters: dict[str, jax.Array]) -> dict:
    """`params` with every adapter added to its weight; the adapters are not needed any more."""
    merged = dict(params)
    for path in adapted(lora):
        merged[path] = merge_adapter(lora, params[path], adapters[f"{path}.lora_a"], adapters[f"{path}.lora_b"])
    return merged


def merge_adapter(lora: LoraTable, kernel, a, b) -> jax.Array:
    """A weight `[L, *in, *out]` with its adapter `[L, *in, rank]`, `[L, rank, *out]` added, in the weight's dtype."""
    # Over the rank, layer by layer.
    change = jax.lax.dot_general(a, b, (((a.ndim - 1,), (1,)), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST)
    change = change * (lora.alpha / lora.rank)
    return (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
