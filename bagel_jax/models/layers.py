"""Layers with the numerics that all networks here share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

# Names as in Hugging Face's ACT2FN, which is what the json files use.
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def precision(dtype) -> jax.lax.Precision:
    """Matrix precision for a compute dtype: float32 means float32 on every platform.

    TPUs and recent GPUs multiply float32 in fewer bits unless told otherwise, which would break parity.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def linear(width_in: int, width_out: int, dtype, rngs: nnx.Rngs, *, bias: bool = True) -> nnx.Linear:
    """`nnx.Linear` [..., width_in] -> [..., width_out] computing and stored in `dtype`."""
    return nnx.Linear(
        width_in, width_out, use_bias=bias, dtype=dtype, param_dtype=dtype, precision=precision(dtype), rngs=rngs
    )


def rms_norm(width: int, eps: float, dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """`nnx.RMSNorm` over the last axis; statistics in float32."""
    return nnx.RMSNorm(width, epsilon=eps, dtype=dtype, param_dtype=dtype, rngs=rngs)


def layer_norm(width: int, eps: float, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """`nnx.LayerNorm` over the last axis; statistics in float32, variance in two passes as PyTorch's."""
    return nnx.LayerNorm(width, epsilon=eps, dtype=dtype, param_dtype=dtype, use_fast_variance=False, rngs=rngs)


def stack(make, num_layers: int, rngs: nnx.Rngs):
    """`num_layers` modules made by `make(rngs)` as one module whose parameters have a leading axis L.

    `scan_layers` runs them, so a deep model traces and compiles as one layer.
    """

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap
    def stacked(rngs):
        return make(rngs)

    return stacked(rngs)


def scan_layers(layers, step, carry, per_layer=None, *, remat: bool = False):
    """Runs `carry, out = step(layer, carry, x)` over stacked `layers` with `lax.scan`.

    Args:
        layers: what `stack` made.
        step: called with one layer's module, the carry, and that layer's slice of `per_layer`.
        carry: anything; passed from layer to layer.
        per_layer: a pytree whose leaves have a leading axis L.
        remat: under a gradient, keep only the carry of each layer and compute the rest again.

    Returns:
        The last carry, and the outputs stacked on a leading axis L.
    """
    graph, params = nnx.split(layers)

    def body(carry, xs):
        layer_params, x = xs
        return step(nnx.merge(graph, layer_params), carry, x)

    return jax.lax.scan(jax.checkpoint(body) if remat else body, carry, (params, per_layer))
