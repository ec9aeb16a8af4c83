"""Whether a model fits its devices, and what for: told from sizes alone, before gigabytes are read.

Weights and pages are counted exactly. What programs need meanwhile is estimated, by a rule that lies above what the
compilers say (`compiled.memory_analysis()`) of the published model's largest programs, for the largest image:

| GiB a device, bfloat16, 1024² | v6e-1 | v6e-4 data 2 x tensor 2 | v5e-4 tensor 4 | v5p-8 data 4 | H100 |
|---|---|---|---|---|---|
| denoising 2 requests of 3 rows: compiled | 3.15 | 0.73 | 1.13 | 1.57 | 2.25 |
| by the rule | 3.24 | 1.19 | 1.18 | 1.57 | 3.24 |
| the autoencoder's decoder: compiled | 2.78 | 0.58 | 0.77 | 0.78 | 1.00 |
| by the rule | 3.25 | 0.81 | 0.81 | 0.81 | 3.25 |

What is estimated too high refuses nothing: it is only told.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from bagel_jax.config import BagelConfig
from bagel_jax.devices import MeshShape
from bagel_jax.engine.denoise.decoder import TILE
from bagel_jax.engine.kv.store import (
    SHARE,
    VIEWS,
    all_blocks,
    count_pages,
    largest_context,
    page_bytes,
)
from bagel_jax.errors import InputError
from bagel_jax.models.weights import abstract_weights, flatten, weight_bytes
from bagel_jax.placement.placement import Placement, machine_memory
from bagel_jax.placement.rules import SERVING, Rules, cut_size
from bagel_jax.placement.spread import AXES, TENSOR
from bagel_jax.settings import EngineConfig

_MOST_DEVICES = 64  # along `tensor`, that a model which does not fit is tried on


@dataclass(frozen=True)
class Outlook:
    """What a model will have on its devices, those that have most of it; bytes are of one."""

    weights: int  # bytes of all
    devices: int  # of both stages
    meshes: tuple[MeshShape, ...]  # of the stages; one where they have the same
    share: int  # bytes of weights
    free: int | None  # bytes without weights and pages; None: a CPU, of which nothing is told
    pages: int | None  # of the KV cache in stage 0
    image: int  # pixels along the side of the largest image for which there will be memory; 0: for none

    def __str__(self) -> str:
        said = f"{_gib(self.weights)} of weights over {_devices(self.devices)}"
        if self.devices > 1:
            said += f" ({' and '.join(map(str, self.meshes))}), {_gib(self.share)} each"
        if self.pages is None:
            return said
        said += f"; {self.pages:,} pages"
        if self.image:
            return f"{said}; images up to {self.image}x{self.image}"
        return (
            f"{said}; {self.free / 2**30:.1f} GiB are left for programs, which may be too little for images: give "
            "another num_pages, a smaller dit_max_num_seqs, or more devices"
        )


def outlook(
    placements: tuple[Placement, Placement], config: BagelConfig, settings: EngineConfig, dtype: jnp.dtype
) -> Outlook:
    """What a model will have on the devices of its stages, of which nothing is used for it yet.

    Args:
        placements: of stage 0 and stage 1.
        config, settings, dtype: of the model and the engine.

    Raises:
        InputError: its weights do not fit, or no pages beside them.
    """
    total = weight_bytes(config, dtype)
    meshes = list(dict.fromkeys(place.mesh for place in placements))
    devices = {device for mesh in meshes for device in mesh.devices.flat}
    shares = {place.mesh: weights_a_device(config, dtype, place.mesh, place.rules) for place in placements}

    def held(place: Placement) -> int:
        # Two meshes of the same devices have the weights on them twice.
        return max(
            sum(shares[mesh] for mesh in meshes if device in set(mesh.devices.flat))
            for device in place.mesh.devices.flat
        )

    shapes = tuple(dict.fromkeys(place.shape for place in placements))
    frees = [place.memory() for place in placements]
    if None in frees:
        # All devices of a CPU share the machine's memory.
        here = jax.process_index()
        needed = sum(shares[m] * sum(d.process_index == here for d in m.devices.flat) for m in meshes)
        if needed > machine_memory():
            raise InputError(
                f"the model's weights take {_gib(needed)} in {jnp.dtype(dtype).name} and the machine has "
                f"{_gib(machine_memory())}; {_narrower(dtype)}give a machine with more memory"
            )
        return Outlook(total, len(devices), shapes, max(shares.values()), None, None, 0)

    left = []
    for place, free in zip(placements, frees, strict=True):
        if held(place) >= free:
            raise _too_large(place, config, settings, dtype, held(place), free)
        left.append(free - held(place))
    context, denoise = placements
    own = context is denoise
    a_page = page_bytes(config, settings.page_size, dtype, context)
    pages = count_pages(int(SHARE * left[0]), a_page, config, settings, contexts=True, images=own)
    left[0] -= pages * a_page
    if not own:
        if set(context.mesh.devices.flat) & set(denoise.mesh.devices.flat):
            left[1] -= pages * a_page
        a_page = page_bytes(config, settings.page_size, dtype, denoise)
        other = count_pages(int(SHARE * left[1]), a_page, config, settings, contexts=False, images=True)
        left[1] -= other * a_page
    image = _largest_image(denoise.mesh, config, settings, dtype, left[1 - own], pages if own else other)
    return Outlook(total, len(devices), shapes, max(map(held, placements)), min(left[: 2 - own]), pages - 1, image)


def weights_a_device(config: BagelConfig, dtype, mesh: Mesh | AbstractMesh, rules: Rules = SERVING) -> int:
    """Bytes of the weights that each device of a mesh has, whether it is here or not."""
    sizes = (cut_size(path, shape, mesh, rules) for path, shape in _shapes(config).items())
    return sum(sizes) * jnp.dtype(dtype).itemsize


@functools.cache
def _shapes(config: BagelConfig) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten(abstract_weights(config, jnp.float32).params).items()}


def temporaries(mesh: Mesh | AbstractMesh, config: BagelConfig, settings: EngineConfig, dtype, side: int) -> int:
    """Bytes that a device needs for the largest program of images of `side` pixels; see this file's head.

    Denoising: what its rows' tokens have in the MLP (gate and up) and three times their width, and another layout of
    the embedding. The autoencoder: 13 times the width of its finest level a pixel.
    """
    c, itemsize = config.trunk, jnp.dtype(dtype).itemsize
    tensor = math.prod(mesh.shape[axis] for axis in TENSOR)
    tokens = (side // config.token_pixels) ** 2 * VIEWS * settings.dit_max_num_seqs
    tokens = -(-tokens * tensor // mesh.size)
    denoising = tokens * (2 * c.mlp_width // tensor + 3 * c.hidden_size)
    denoising += c.vocab_size * c.hidden_size // tensor
    if settings.vae_tiling:
        side = min(side, TILE * config.token_pixels)
    decoding = 13 * config.autoencoder.base_width * side**2 // mesh.size
    return max(denoising, decoding) * itemsize


def _largest_image(mesh: Mesh, config: BagelConfig, settings: EngineConfig, dtype, free: int, pages: int) -> int:
    def fits(side: int) -> bool:
        meanwhile = temporaries(mesh, config, settings, dtype, side * config.token_pixels)
        return meanwhile <= free and _edit_pages(config, settings, side) < pages

    return next(filter(fits, range(config.max_latent_size, 0, -1)), 0) * config.token_pixels


def _edit_pages(config: BagelConfig, settings: EngineConfig, side: int) -> int:
    """Pages of one edit of an image of so many latent tokens a side."""
    size = settings.page_size
    return largest_context(config, size, side) + all_blocks(side**2, size)


def _too_large(
    place: Placement, config: BagelConfig, settings: EngineConfig, dtype, held: int, free: int
) -> InputError:
    """Says what would fit: the fewest devices along `tensor` with room for the largest images and their contexts."""
    said = f"the model's weights take {_gib(weight_bytes(config, dtype))} in {jnp.dtype(dtype).name}"
    said += f", {_gib(held)} a device of this mesh," if place.mesh.size > 1 else ""
    said += f" and the device has {_gib(free)}; {_narrower(dtype)}"
    a_page = page_bytes(config, settings.page_size, dtype, place) * place.share_of_page()
    pages = 1 + _edit_pages(config, settings, config.max_latent_size)
    for tensor in range(2, _MOST_DEVICES + 1):
        heads = math.gcd(tensor, config.trunk.num_kv_heads)
        mesh = AbstractMesh((1, 1, heads, tensor // heads), AXES, axis_types=(AxisType.Auto,) * len(AXES))
        needed = weights_a_device(config, dtype, mesh) + pages * a_page // heads
        if needed + temporaries(mesh, config, settings, dtype, config.max_image_size) <= free:
            there = jax.device_count()
            more = "or more devices" if tensor <= there else f"on as many devices, of which there are {there}"
            return InputError(f"{said}give --mesh tensor={tensor} {more}")
    return InputError(f"{said}no mesh of up to {_MOST_DEVICES} such devices holds them, so take larger ones")


def _narrower(dtype) -> str:
    return "" if jnp.dtype(dtype).itemsize < 4 else "give --dtype bfloat16, or "


def _gib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count < 2**27 else f"{count / 2**30:.1f} GiB"


def _devices(count: int) -> str:
    return "one device" if count == 1 else f"{count} devices"
