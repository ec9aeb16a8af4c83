"""Samples as arrays of tokens, and rows of them as what the objective takes.

A sample is a list of segments, as a request's context is, but that some texts have a loss and some images noise on
them. Its tokens are sorted by what they are: texts (the markers of images among them), ViT patches, latents. A row
of a batch has a fixed number of places for each kind, filled with the tokens of several samples; where in its sample a
token stands is told by its numbers, not by its place.

Source: `pack_sequence` in the official `data/dataset_base.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from bagel_jax.models.attention import Sight

# Images of one row are told apart by sample * this + number in the sample.
_IMAGES = 1024


@dataclass(frozen=True)
class TextPart:
    """`<|im_start|> … <|im_end|>` as `ids`; with a `loss`, each id but the last learns to be followed by the next."""

    ids: tuple[int, ...]
    loss: bool = False


@dataclass(frozen=True)
class VitPart:
    """An image to be understood."""

    patches: np.ndarray  # [n, patch * patch * channels]
    position_ids: np.ndarray  # [n]


@dataclass(frozen=True)
class VaePart:
    """An image's latents: clean, or noised up to `timestep` and learned."""

    latents: np.ndarray  # [n, C p²], clean
    position_ids: np.ndarray  # [n]
    timestep: float = 0.0  # in (0, 1] where there is noise
    noise: np.ndarray | None = None  # [n, C p²] standard normal; None: clean


@dataclass(frozen=True)
class Dropped:
    """A condition left out. An image left out still moves the RoPE position on, as in the official code."""

    rope_advance: int


Part = TextPart | VitPart | VaePart | Dropped
Sample = dict[str, np.ndarray]


class Spot(NamedTuple):
    """Where a token stands, each `[..., T]` int32."""

    rope: Any
    order: Any
    end: Any
    image: Any  # number of its image in the sample, from 1; 0: none
    noised: Any  # the same, if that image is noised; else 0


def lay_out(
    parts: list[Part], markers: tuple[int, int], *, patch_dim: int, latent_dim: int, ce_power: float = 0.0
) -> Sample:
    """One sample's tokens, by kind.

    Args:
        parts: the sample's segments, in order.
        markers: ids of `<|vision_start|>` and `<|vision_end|>`.
        patch_dim: numbers in a ViT patch.
        latent_dim: numbers in a latent token, C p².
        ce_power: a token's cross-entropy weighs `length ** -ce_power`, length being its text's number of tokens with
            a loss: 0 weighs tokens alike, 1 texts, 0.5 between (`len2weight` in the official `data/data_utils.py`).

    Returns:
        `text` `[n, 7]` int32 (id, label or -1, then the fields of `Spot`), `text_weight` `[n]`, `vit` `[n, 6]` int32
        (position, `Spot`), `vit_patches` `[n, patch_dim]`, `latent` `[n, 6]` int32, `latents` and `noise` `[n, C p²]`,
        `timestep` `[n]`.
    """
    text, weights, vit, patches, latent, latents, noise, timesteps = ([] for _ in range(8))
    place = rope = images = 0
    for part in parts:
        if isinstance(part, Dropped):
            rope += part.rope_advance
        elif isinstance(part, TextPart):
            n = len(part.ids)
            rows = np.zeros((n, 7), np.int32)
            rows[:, 0], rows[:, 1] = part.ids, -1
            rows[:, 2] = rope + np.arange(n)
            rows[:, 3] = place + np.arange(n)
            rows[:, 4] = rows[:, 3] + 1
            weight = np.zeros(n, np.float32)
            if part.loss:
                rows[:-1, 1] = part.ids[1:]
                weight[:-1] = float(n - 1) ** -ce_power
            text.append(rows)
            weights.append(weight)
            place, rope = place + n, rope + n
        else:
            images += 1
            n = len(part.position_ids)
            noised = isinstance(part, VaePart) and part.noise is not None
            spot = np.array([rope, 0, place + n + 2, images, images if noised else 0], np.int32)
            both = np.zeros((2, 7), np.int32)
            both[:, 0], both[:, 1], both[:, 2:] = markers, -1, spot
            both[:, 3] = place, place + n + 1
            text.append(both)
            weights.append(np.zeros(2, np.float32))
            rows = np.zeros((n, 6), np.int32)
            rows[:, 0], rows[:, 1:] = part.position_ids, spot
            rows[:, 2] = place + 1 + np.arange(n)
            if isinstance(part, VitPart):
                vit.append(rows)
                patches.append(part.patches)
            else:
                latent.append(rows)
                latents.append(part.latents)
                noise.append(part.noise if noised else np.zeros_like(part.latents))
                timesteps.append(np.full(n, part.timestep if noised else 0.0, np.float32))
            # A noised image is seen by nobody, so what follows it stands where it stood.
            place, rope = place + n + 2, rope + (0 if noised else 1)

    def join(arrays, shape, dtype):
        return np.concatenate([np.zeros(shape, dtype), *arrays]).astype(dtype)

    return {
        "text": join(text, (0, 7), np.int32),
        "text_weight": join(weights, (0,), np.float32),
        "vit": join(vit, (0, 6), np.int32),
        "vit_patches": join(patches, (0, patch_dim), np.float32),
        "latent": join(latent, (0, 6), np.int32),
        "latents": join(latents, (0, latent_dim), np.float32),
        "noise": join(noise, (0, latent_dim), np.float32),
        "timestep": join(timesteps, (0,), np.float32),
    }


# Which places of a row each array of a sample takes.
KINDS = {
    "text": "text",
    "text_weight": "text",
    "vit": "vit",
    "vit_patches": "vit",
    "latent": "latent",
    "latents": "latent",
    "noise": "latent",
    "timestep": "latent",
}


def pack(rows: list[list[Sample]], places: dict[str, int]) -> dict[str, np.ndarray]:
    """The samples of each row side by side.

    Args:
        rows: the samples of each row; they must fit.
        places: the number of places of each kind (`text`, `vit`, `latent`) in a row.

    Returns:
        The arrays of `lay_out` with an axis of rows in front, padded to the places, and for each kind
        `{kind}_sample`, the number of the sample in its row that a place belongs to, from 1; 0 is padding.
    """
    template = next(sample for samples in rows for sample in samples)
    batch = {
        name: np.zeros((len(rows), places[kind], *template[name].shape[1:]), template[name].dtype)
        for name, kind in KINDS.items()
    }
    batch |= {f"{kind}_sample": np.zeros((len(rows), size), np.int32) for kind, size in places.items()}
    for i, samples in enumerate(rows):
        at = dict.fromkeys(places, 0)
        for number, sample in enumerate(samples, 1):
            ends = {kind: start + len(sample[kind]) for kind, start in at.items()}
            for name, kind in KINDS.items():
                batch[name][i, at[kind] : ends[kind]] = sample[name]
            for kind in places:
                batch[f"{kind}_sample"][i, at[kind] : ends[kind]] = number
            at = ends
    return batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """B rows of packed samples: `Tt` text, `Tv` ViT and N latent places each."""

    ids: jax.Array  # [B, Tt]
    labels: jax.Array  # [B, Tt]; -1: no loss
    text_weight: jax.Array  # [B, Tt]; 0 where there is no loss
    patches: jax.Array  # [B, Tv, patch_dim]
    vit_positions: jax.Array  # [B, Tv]
    latents: jax.Array  # [B, N, C p²], clean
    noise: jax.Array  # [B, N, C p²]
    timestep: jax.Array  # [B, N]; 0: clean
    latent_positions: jax.Array  # [B, N]
    rope: jax.Array  # [B, Tt + Tv + N]
    sight: Sight  # [B, Tt + Tv + N]
    vit_sight: Sight  # [B, Tv]

    @classmethod
    def of(cls, packed: dict[str, np.ndarray]) -> Batch:
        """From the arrays that `pack` makes."""
        spots, samples = [], []
        for name, skip in (("text", 2), ("vit", 1), ("latent", 1)):
            spots.append(Spot(*np.moveaxis(packed[name][..., skip:], -1, 0)))
            samples.append(packed[f"{name}_sample"])
        spot = Spot(*(np.concatenate(parts, axis=1) for parts in zip(*spots, strict=True)))
        sample = np.concatenate(samples, axis=1)
        vit_sample = np.where(samples[1] > 0, samples[1] * _IMAGES + spots[1].image, 0)
        zero = np.zeros_like(vit_sample)
        batch = cls(
            ids=packed["text"][..., 0],
            labels=np.where(samples[0] > 0, packed["text"][..., 1], -1),
            text_weight=packed["text_weight"],
            patches=packed["vit_patches"],
            vit_positions=packed["vit"][..., 0],
            latents=packed["latents"],
            noise=packed["noise"],
            timestep=packed["timestep"],
            latent_positions=packed["latent"][..., 0],
            rope=spot.rope,
            sight=Sight(sample, spot.order, spot.end, spot.noised),
            vit_sight=Sight(vit_sample, zero, zero + 1, zero),
        )
        return jax.tree.map(np.ascontiguousarray, batch)
