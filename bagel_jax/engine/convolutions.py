"""Programs of many convolutions, which a TPU's compiler is to be done with in a minute.

For each convolution libtpu generates code for the tiling that it believes fastest, unrolled without regard to what
that takes: 7 to 17 s for each of the autoencoder's on two cores, so that the decoder of a 1024² image took more than
eight minutes. Content with a little less than the best, it generates a third of the code in a fifth of the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from bagel_jax.models.weights import Skeleton

# libtpu 0.0.42 and 0.0.50 know it; at 0.9 the decoder still took half as long again. The numbers are the same.
_TPU_OPTIONS = {"xla_jf_convolution_performance_target": "0.7"}


class ConvolutionProgram:
    """`jax.jit` of `function(skeleton, arrays, ...)`, with a TPU's compiler options where the arrays are on one.

    Other compilers refuse options that they do not know, and a program inside of another one cannot have any.
    """

    def __init__(self, function: Callable, static_argnames: Sequence[str]):
        functools.update_wrapper(self, function)
        self._usual = jax.jit(function, static_argnames=static_argnames)
        self._on_tpu = jax.jit(function, static_argnames=static_argnames, compiler_options=_TPU_OPTIONS)

    def on(self, platform: str) -> Any:
        """The jitted function for a platform, `cpu`, `gpu` or `tpu`."""
        return self._on_tpu if platform == "tpu" else self._usual

    def __call__(self, skeleton: Skeleton, arrays: Sequence[jax.Array], *args: Any, **options: Any) -> jax.Array:
        """Runs it where the arrays are."""
        first = arrays[0]
        traced = isinstance(first, jax.core.Tracer) or not isinstance(first, jax.Array)
        platform = "" if traced else next(iter(first.devices())).platform
        return self.on(platform)(skeleton, arrays, *args, **options)


def convolution_program(*static_argnames: str) -> Callable[[Callable], ConvolutionProgram]:
    """Decorates what is to be a `ConvolutionProgram`."""
    return functools.partial(ConvolutionProgram, static_argnames=static_argnames)
