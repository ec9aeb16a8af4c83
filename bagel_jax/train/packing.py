"""Samples as arrays of tokens, and rows of them as what the objective takes.

A sample is a list of segments, as a request's context is (`layout.py`), but that some texts have a loss and some images
noise on them. Its tokens are sorted by what they are: texts (the markers of images among them), ViT patches, latents. A
row of a batch has a fixed number of places for each kind, filled with the tokens of several samples; where in its
sample a token stands is told by its numbers, not by its place in the row.

Source: `pack_sequence` in the official `data/dataset_base.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from bagel_jax.layout import (
    NUM_MARKERS,
    TEXT,
    VAE,
    VIT,
    Gap,
    PackedMask,
    Segment,
    Text,
    VaeImage,
    VitImage,
    place,
    tokens,
)

# Images of one row are told apart by sample * this + number in the sample.
_IMAGES = 1024


@dataclass(frozen=True)
class TextPart:
    """`<|im_start|> … <|im_end|>` as `ids`; with a `loss`, each id but the last learns to be followed by the next."""

    ids: tuple[int, ...]
    loss: bool = False

    def segment(self, image: int) -> Segment:
        """What it is to the layout; `image` numbers the images of a sample."""
        return Text(self.ids)


@dataclass(frozen=True)
class VitPart:
    """An image to be understood."""

    patches: np.ndarray  # [n, patch * patch * channels]
    position_ids: np.ndarray  # [n]

    def segment(self, image: int) -> Segment:
        """See `TextPart.segment`; of its grid only the number of patches matters here."""
        return VitImage(image, 1, len(self.position_ids))


@dataclass(frozen=True)
class VaePart:
    """An image's latents: clean, or noised up to `timestep` and learned."""

    latents: np.ndarray  # [n, C p²], clean
    position_ids: np.ndarray  # [n]
    timestep: float = 0.0  # in (0, 1] where there is noise
    noise: np.ndarray | None = None  # [n, C p²] standard normal; None: clean

    def segment(self, image: int) -> Segment:
        """See `TextPart.segment`."""
        return VaeImage(image, 1, len(self.position_ids), noised=self.noise is not None)


Part = TextPart | VitPart | VaePart | Gap
Sample = dict[str, np.ndarray]
# The columns of a token that tell where it stands: fields of `layout.Tokens`.
_STANDS = ("rope", "place", "kv_end", "block", "noised")


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
        `text` `[n, 7]` int32 (id, label or -1, then RoPE position, place, kv_end, block and noised block as in
        `layout.Tokens`), `text_weight` `[n]`, `vit` `[n, 6]` int32 (row of the position table, the same five),
        `vit_patches` `[n, patch_dim]`, `latent` `[n, 6]` int32, `latents` and `noise` `[n, C p²]`, `timestep` `[n]`.
    """
    segments = [part if isinstance(part, Gap) else part.segment(i) for i, part in enumerate(parts)]
    laid = tokens(place(segments), markers)
    vits = [part for part in parts if isinstance(part, VitPart)]
    vaes = [part for part in parts if isinstance(part, VaePart)]

    def join(arrays, shape, dtype):
        return np.concatenate([np.zeros(shape, dtype), *arrays]).astype(dtype)

    def table(kind: int, *columns: np.ndarray) -> np.ndarray:
        some = laid.of(laid.kind == kind)
        return np.stack([*columns, *(getattr(some, name) for name in _STANDS)], axis=1).astype(np.int32)

    learned = [_learned(part, ce_power) for part in parts]
    return {
        "text": table(TEXT, laid.id[laid.kind == TEXT], join([labels for labels, _ in learned], (0,), np.int32)),
        "text_weight": join([weights for _, weights in learned], (0,), np.float32),
        "vit": table(VIT, join([part.position_ids for part in vits], (0,), np.int32)),
        "vit_patches": join([part.patches for part in vits], (0, patch_dim), np.float32),
        "latent": table(VAE, join([part.position_ids for part in vaes], (0,), np.int32)),
        "latents": join([part.latents for part in vaes], (0, latent_dim), np.float32),
        "noise": join(
            [np.zeros_like(part.latents) if part.noise is None else part.noise for part in vaes],
            (0, latent_dim),
            np.float32,
        ),
        "timestep": join(
            [np.full(len(part.latents), 0.0 if part.noise is None else part.timestep) for part in vaes],
            (0,),
            np.float32,
        ),
    }


def _learned(part: Part, ce_power: float) -> tuple[np.ndarray, np.ndarray]:
    """Label and weight of each text token or marker of a segment, in order."""
    count = len(part.ids) if isinstance(part, TextPart) else 0 if isinstance(part, Gap) else NUM_MARKERS
    labels, weights = np.full(count, -1, np.int32), np.zeros(count, np.float32)
    if isinstance(part, TextPart) and part.loss:
        labels[:-1] = part.ids[1:]
        weights[:-1] = float(count - 1) ** -ce_power
    return labels, weights


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
    mask: PackedMask  # [B, Tt + Tv + N]
    vit_mask: PackedMask  # [B, Tv]

    @classmethod
    def of(cls, packed: dict[str, np.ndarray]) -> Batch:
        """From the arrays that `pack` makes."""
        stands, samples = [], []
        for name, skip in (("text", 2), ("vit", 1), ("latent", 1)):
            columns = dict(zip(_STANDS, np.moveaxis(packed[name][..., skip:], -1, 0), strict=True))
            stands.append(columns)
            samples.append(packed[f"{name}_sample"])
        rope, position, kv_end, noised = (
            np.concatenate([columns[name] for columns in stands], axis=1)
            for name in ("rope", "place", "kv_end", "noised")
        )
        sample = np.concatenate(samples, axis=1)
        # To the ViT an image is a sample of its own, in which all see all: one place, which ends before 1.
        vit_sample = np.where(samples[1] > 0, samples[1] * _IMAGES + stands[1]["block"], 0)
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
            rope=rope,
            mask=PackedMask(sample, position, kv_end, noised),
            vit_mask=PackedMask(vit_sample, zero, zero + 1, zero),
        )
        return jax.tree.map(np.ascontiguousarray, batch)
