"""The chips to compile for, slices of them, and what is known of them.

The compilers are the real ones: libtpu's for a TPU; XLA's, Mosaic GPU's and ptxas for an H100. They come with the extra
`aot` and need no accelerator.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from bagel_jax.errors import InputError

_INSTALL = "pip install 'bagel_jax[aot]'"
SILENCE = {"TF_CPP_MIN_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}
# JAX itself runs on the CPU, libtpu is not to look for a TPU nor for others that use one, and what a cache holds is
# not compiled.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}


class Target(NamedTuple):
    """A chip to compile for."""

    platform: str  # what JAX calls it
    topology: str
    modules: tuple[str, ...]  # what must be importable
    backend: str  # of `paged_attention`
    call: str  # what a kernel of that backend is called in a program
    memory: str  # what is reported


def _tpu(topology: str) -> Target:
    return Target("tpu", topology, ("libtpu",), "tpu", "tpu_custom_call", "VMEM")


TARGETS = {
    "v5e": _tpu("v5e:2x2"),
    "v6e": _tpu("v6e:2x2"),
    "v5p": _tpu("v5p:2x2x1"),
    "h100": Target(
        "cuda", "h100", ("jax_plugins.xla_cuda12", "nvidia.cuda_nvcc"), "gpu", "mosaic_gpu_v2", "shared memory"
    ),
}


class Chip(NamedTuple):
    """What a device has and does, as its maker says; in GiB, TFLOP/s in bfloat16, and GB/s.

    Sources: the pages of v5e, v6e and v5p in Google's Cloud TPU documentation ("peak compute per chip", "HBM bandwidth
    per chip", "interchip interconnect bandwidth": 1,600, 3,584 and 4,800 Gbit/s), and NVIDIA's data sheet of the H100
    SXM. Links are counted in one direction, which is half of what those say. Memory is what the runtime leaves.
    """

    memory: float
    compute: float
    bandwidth: float
    links: float


CHIPS = {
    "v5e": Chip(15.75, 197, 819, 100),
    "v6e": Chip(31.25, 918, 1640, 224),
    "v5p": Chip(95, 459, 2765, 300),
    "h100": Chip(79, 989, 3350, 450),
}


class Slice(NamedTuple):
    """Devices that a stage may have."""

    target: str  # of `TARGETS`
    count: int  # of devices
    topology: str  # as libtpu calls the smallest that has as many; for a GPU slices x hosts x devices


SLICES = {
    "v5e-4": Slice("v5e", 4, "v5e:2x2"),
    "v5e-8": Slice("v5e", 8, "v5e:2x4"),
    "v5e-16": Slice("v5e", 16, "v5e:4x4"),
    "v6e-1": Slice("v6e", 1, "v6e:2x2"),
    "v6e-4": Slice("v6e", 4, "v6e:2x2"),
    "v6e-8": Slice("v6e", 8, "v6e:2x4"),
    "v5p-8": Slice("v5p", 4, "v5p:2x2x1"),  # named by its cores, of which a chip has two
    "h100x1": Slice("h100", 1, "1x1x1"),
    "h100x2": Slice("h100", 2, "1x1x2"),
    "h100x8": Slice("h100", 8, "1x1x8"),
}


def devices(name: str, target: Target, topology: str | None = None) -> list[Any]:
    """The devices of a topology, or of the target's own, to compile for.

    Raises:
        InputError: its compiler is not installed, or does not know the topology.
    """
    for module in target.modules:
        if not _installed(module):
            raise InputError(f"--target {name} needs {module}, which is not installed; {_INSTALL}")
    os.environ.update(ENVIRONMENT | SILENCE)
    with _quiet():  # plugins tell what they do not find here
        import jax
        from jax.experimental import topologies

        jax.devices()
        options = {}
        if target.platform == "cuda":
            description = Path(__file__).parents[1] / "pallas" / "targets" / f"{target.topology}.txtpb"
            options = {"topology": topology or "1x1x1", "target_config": description.read_text()}
        try:
            named = target.topology if target.platform == "cuda" else topology or target.topology
            found = topologies.get_topology_desc(platform=target.platform, topology_name=named, **options)
        except Exception as error:  # of whatever kind the plugin has
            reason = " ".join(str(error).split())
            raise InputError(f"--target {name}: its compiler does not start ({reason[:300]}); {_INSTALL}") from error
    return list(found.devices)


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what is written to standard error, by C++ too, off the screen."""
    sys.stderr.flush()
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
