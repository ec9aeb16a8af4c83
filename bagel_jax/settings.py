"""How the stages run, as against what a request asks for. No jax here: bad options are found without it."""

from __future__ import annotations

import os
import re
import warnings
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from bagel_jax.devices import MeshShape, device_numbers
from bagel_jax.errors import InputError, check_choice, validated

Attention = Literal["auto", "reference", "xla", "pallas"]
ATTENTION = get_args(Attention)
# Read where the choice is auto.
ATTENTION_VARIABLE = "BAGEL_JAX_ATTENTION"
Topology = Literal["two-stage", "single-stage"]
TOPOLOGIES = get_args(Topology)


def _field(description: str, metavar: str | None = None, *, group: str = "serving", flags=(), **limits: Any) -> Meta:
    """What is to be said of a field beside its type and default; `command.add_flags` reads `extra`."""
    return Meta(description=description, extra={"group": group, "metavar": metavar, "flags": flags}, **limits)


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the two stages run.

    Raises:
        InputError: a value out of range, that of the environment variable `BAGEL_JAX_ATTENTION` included.
    """

    ar_max_num_seqs: Annotated[
        int,
        _field(
            "requests at once in stage 0, which makes contexts and texts",
            "N",
            flags=("--ar-max-num-seqs", "--max-num-seqs"),
            ge=1,
            le=1024,
        ),
    ] = 8
    dit_max_num_seqs: Annotated[int, _field("images at once in stage 1, which denoises", "N", ge=1, le=256)] = 2
    mesh: Annotated[
        str,
        _field(
            "devices of both stages along axes, as data=2,tensor=4: data has requests and guidance rows, sequence the "
            "tokens of one image, tensor heads and MLP (default: chosen for the devices and the model; one on a CPU)",
            "AXES",
        ),
    ] = ""
    ar_mesh: Annotated[str, _field("as --mesh, of stage 0 alone", "AXES")] = ""
    dit_mesh: Annotated[str, _field("as --mesh, of stage 1 alone", "AXES")] = ""
    ar_devices: Annotated[str, _field("numbers of the devices of stage 0, as 0-3 or 0,2", "LIST")] = ""
    dit_devices: Annotated[str, _field("numbers of the devices of stage 1", "LIST")] = ""
    # Each stage has the weights on its own devices.
    ar_device: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        _field("number of the first device of stage 0, the only one without a mesh", "I"),
    ] = None
    dit_device: Annotated[Annotated[int, Meta(ge=0)] | None, _field("the same of stage 1", "I")] = None
    topology: Annotated[
        Topology, _field("two-stage: both stages at the same time, a thread each; single-stage: by turns")
    ] = "two-stage"
    # A block larger than the limit has a step with no other prefill.
    max_num_batched_tokens: Annotated[int, _field("tokens a step; a block of an image is never cut", "N", ge=16)] = 2048
    page_size: Annotated[Literal[16, 32, 64, 128], _field("tokens a page of the KV cache")] = 64
    num_pages: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        _field("pages of the KV cache (default: from the memory, the largest contexts and images)", "N"),
    ] = None
    prefix_cache: Annotated[bool, _field("find contexts of earlier requests again by what is in them")] = True
    attention: Annotated[
        Attention,
        _field(
            f"auto: ${ATTENTION_VARIABLE}, or pallas on TPU and GPU, xla on a CPU; pallas on a CPU is interpreted",
        ),
    ] = "auto"
    precompile: Annotated[
        str,
        _field("compile before the first request, for images of these sizes: 1024x768,512x512 (WxH), or all", "SIZES"),
    ] = ""
    vae_tiling: Annotated[bool, _field("decode large images in tiles: less memory", group="images")] = False

    def __post_init__(self):
        validated(self)
        if self.attention == "auto" and (chosen := os.environ.get(ATTENTION_VARIABLE)):
            check_choice(ATTENTION_VARIABLE, chosen, ATTENTION)
            msgspec.structs.force_setattr(self, "attention", chosen)
        if self.max_num_batched_tokens < self.ar_max_num_seqs:
            raise InputError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be at least ar_max_num_seqs, "
                f"{self.ar_max_num_seqs}, since each request in work decodes a token a step"
            )
        _ = self.precompile_sizes
        for stage in ("ar", "dit"):
            if self.stage_devices(stage) is not None and self.stage_device(stage, asked=True) is not None:
                raise InputError(f"{stage}_device and {stage}_devices are both given; give one of them")
            self.stage_mesh(stage)

    def stage_mesh(self, stage: str) -> MeshShape | None:
        """The mesh of a stage, `ar` or `dit`; None: to be chosen."""
        name = f"{stage}_mesh" if getattr(self, f"{stage}_mesh") else "mesh"
        text = getattr(self, name)
        return MeshShape.parse(name, text) if text else None

    def stage_devices(self, stage: str) -> tuple[int, ...] | None:
        """The numbers of the devices of a stage, `ar` or `dit`; None: to be chosen."""
        name = f"{stage}_devices"
        text = getattr(self, name)
        return device_numbers(name, text) if text else None

    def stage_device(self, stage: str, *, asked: bool = False) -> int | None:
        """The number of a stage's first device; None: to be chosen. Where only the other stage's is said, it is 0."""
        device = getattr(self, f"{stage}_device")
        said = self.ar_device is not None or self.dit_device is not None
        return 0 if device is None and said and not asked else device

    @property
    def precompile_sizes(self) -> tuple[tuple[int, int], ...] | Literal["all"] | None:
        """What `precompile` says: (height, width) of each size; None: nothing.

        Raises:
            InputError: it says something else.
        """
        if self.precompile in ("", "all"):
            return self.precompile or None
        sizes = []
        for size in self.precompile.split(","):
            found = re.fullmatch(r"0*([1-9][0-9]{0,5})x0*([1-9][0-9]{0,5})", size.strip(), re.ASCII)
            if found is None:
                raise InputError(
                    f"precompile is {self.precompile!r}; it must be all, or sizes in pixels as 1024x768,512x512 "
                    "(width x height)"
                )
            sizes.append((int(found[2]), int(found[1])))
        return tuple(dict.fromkeys(sizes))


def attention_backend(choice: str, platform: str) -> str:
    """The backend of `pallas/paged_attention` for one of `ATTENTION` on a platform (`cpu`, `tpu` or `gpu`).

    `auto` is kernels on TPU and GPU, XLA on a CPU. `pallas` on a CPU is the TPU kernel, interpreted, which is only good
    for tests.
    """
    if choice == "auto":
        choice = "xla" if platform == "cpu" else "pallas"
    if choice == "pallas":
        return {"cpu": "tpu-interpret"}.get(platform, platform)
    return choice


def __getattr__(name: str) -> Any:
    if name == "ServingSettings":  # until version 0.2
        warnings.warn("ServingSettings is called EngineConfig now", DeprecationWarning, stacklevel=2)
        return EngineConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
