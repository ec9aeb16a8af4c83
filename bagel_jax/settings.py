"""How the stages run, as against what a request asks for. No jax here: bad options are found without it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from bagel_jax.errors import InputError, check_choice, check_flag, check_whole

ATTENTION = ("auto", "reference", "xla", "pallas")
# Read where the choice is auto.
ATTENTION_VARIABLE = "BAGEL_JAX_ATTENTION"
TOPOLOGIES = ("two-stage", "single-stage")
PAGE_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class ServingSettings:
    """Settings of the two stages.

    Args:
        ar_max_num_seqs: requests in work at once in stage 0, at most.
        max_num_batched_tokens: tokens a step, at most. A block of an image is never cut: a larger one has a step with
            no other prefill.
        page_size: tokens a page of the KV cache, one of `PAGE_SIZES`.
        num_pages: pages of the KV cache; None: as the device's memory and the largest contexts suggest.
        prefix_cache: keep the pages of finished contexts and find them again by what is in them.
        dit_max_num_seqs: images that stage 1 denoises at once, at most.
        vae_tiling: decode large images in tiles: less memory, not quite the same pixels (`engine/denoise/decoder.py`).
        topology: `two-stage`: the stages work at the same time, each in a thread of its own; `single-stage`: by turns.
        ar_device, dit_device: number of the device that each stage works on; the weights are on both.
        attention: one of `ATTENTION`; for `auto` the environment variable `BAGEL_JAX_ATTENTION` decides if it is set.

    Raises:
        InputError: a value out of range, that of the variable included.
    """

    ar_max_num_seqs: int = 8
    max_num_batched_tokens: int = 2048
    page_size: int = 64
    num_pages: int | None = None
    prefix_cache: bool = True
    dit_max_num_seqs: int = 2
    vae_tiling: bool = False
    topology: str = "two-stage"
    ar_device: int = 0
    dit_device: int = 0
    attention: str = "auto"

    def __post_init__(self):
        check_whole("ar_max_num_seqs", self.ar_max_num_seqs, 1, 1024)
        check_whole("max_num_batched_tokens", self.max_num_batched_tokens, 16)
        check_choice("page_size", self.page_size, PAGE_SIZES)
        if self.num_pages is not None:
            check_whole("num_pages", self.num_pages, 2)
        check_flag("prefix_cache", self.prefix_cache)
        check_whole("dit_max_num_seqs", self.dit_max_num_seqs, 1, 256)
        check_flag("vae_tiling", self.vae_tiling)
        check_choice("topology", self.topology, TOPOLOGIES)
        check_whole("ar_device", self.ar_device, 0)
        check_whole("dit_device", self.dit_device, 0)
        check_choice("attention", self.attention, ATTENTION)
        if self.attention == "auto" and (chosen := os.environ.get(ATTENTION_VARIABLE)):
            check_choice(ATTENTION_VARIABLE, chosen, ATTENTION)
            object.__setattr__(self, "attention", chosen)
        if self.max_num_batched_tokens < self.ar_max_num_seqs:
            raise InputError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be at least ar_max_num_seqs, "
                f"{self.ar_max_num_seqs}, since each request in work decodes a token a step"
            )


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
