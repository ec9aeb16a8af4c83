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


def to_heads(width_in: int, heads: int, width: int, dtype, rngs: nnx.Rngs) -> nnx.LinearGeneral:
    """`linear` [..., width_in] -> [..., heads, width], with a bias.

    Heads are an axis of the kernel, so that devices can share them and never share one head.
    """
    return nnx.LinearGeneral(
        width_in, (heads, width), dtype=dtype, param_dtype=dtype, precision=precision(dtype), rngs=rngs
    )


def from_heads(heads: int, width: int, width_out: int, dtype, rngs: nnx.Rngs) -> nnx.LinearGeneral:
    """`linear` [..., heads, width] -> [..., width_out], without a bias; see `to_heads`."""
    return nnx.LinearGeneral(
        (heads, width),
        width_out,
        axis=(-2, -1),
        use_bias=False,
        dtype=dtype,
        param_dtype=dtype,
        precision=precision(dtype),
        rngs=rngs,
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


def unrolled(make, num_layers: int, rngs: nnx.Rngs):
    """`num_layers` modules as `make(rngs)` makes them, each with parameters of its own: compiles longer than `stack`.

    `Weights.better_unrolled` says where that is worth it. All begin as equals, since making each anew takes 0.3 s and
    they are to be filled from a checkpoint.
    """
    first = make(rngs)
    return nnx.List([first, *(nnx.clone(first) for _ in range(num_layers - 1))])


def scan_layers(layers, step, carry, per_layer=None, *, remat: bool = False):
    """Runs `carry, out = step(layer, carry, x)` over `layers`: `lax.scan` over stacked ones, else one by one.

    Args:
        layers: what `stack` or `unrolled` made.
        step: called with one layer's module, the carry, and that layer's slice of `per_layer`.
        carry: anything; passed from layer to layer.
        per_layer: a pytree whose leaves have a leading axis L.
        remat: under a gradient, keep only the carry of each layer and compute the rest again.

    Returns:
        The last carry, and the outputs stacked on a leading axis L.
    """
    one_by_one = isinstance(layers, nnx.List)
    graph, params = nnx.split(layers[0] if one_by_one else layers)

    def body(carry, xs):
        layer_params, x = xs
        return step(nnx.merge(graph, layer_params), carry, x)

    body = jax.checkpoint(body) if remat else body
    if not one_by_one:
        return jax.lax.scan(body, carry, (params, per_layer))
    outs, body = [], jax.jit(body)  # traced once
    for i, layer in enumerate(layers):
        carry, out = body(carry, (nnx.state(layer), jax.tree.map(lambda x, i=i: x[i], per_layer)))
        outs.append(out)
    return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *outs)
