"""Sizes of a BAGEL model.

The dataclasses hold what the networks need to be built, nothing about serving. They are filled from the
checkpoint's json files and tensor shapes by `bagel_jax.checkpoint.sizes`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class TrunkConfig:
    """The Mixture-of-Transformers language model (official: `modeling/bagel/qwen2_navit.py`)."""

    vocab_size: int  # V
    hidden_size: int  # D
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # E
    mlp_width: int  # F
    rope_theta: float
    norm_eps: float
    activation: str


@dataclass(frozen=True)
class VitConfig:
    """The SigLIP NaViT that reads images to be understood (official: `modeling/bagel/siglip_navit.py`)."""

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_width: int
    patch_size: int  # pixels
    num_positions: int  # rows of the ViT's own position table
    channels: int
    norm_eps: float
    activation: str


@dataclass(frozen=True)
class AutoencoderConfig:
    """The FLUX autoencoder (official: `modeling/autoencoder.py`)."""

    image_channels: int
    base_width: int  # channels after the first convolution
    widths: tuple[int, ...]  # channels of each resolution level, finest first
    num_res_blocks: int
    latent_channels: int  # C
    scale_factor: float
    shift_factor: float

    @property
    def downsample(self) -> int:
        """Pixels along one side of a latent cell."""
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class ImageTransform:
    """Bounds of the resize that an image goes through; all in pixels.

    Source: `ImageTransform(max_image_size, min_image_size, image_stride)` in the official `data/transforms.py`.
    """

    max_size: int
    min_size: int
    stride: int
    max_pixels: int = 14 * 14 * 9 * 1024


@dataclass(frozen=True)
class BagelConfig:
    """Everything the whole model is built from."""

    trunk: TrunkConfig
    vit: VitConfig
    autoencoder: AutoencoderConfig
    latent_patch_size: int
    max_latent_size: int  # latent tokens along one side, at most
    max_vit_patches: int  # ViT patches along one side, at most
    connector_activation: str
    time_frequencies: int
    interpolate_positions: bool

    @property
    def token_pixels(self) -> int:
        """Pixels along one side of one latent token (16 in the published model)."""
        return self.autoencoder.downsample * self.latent_patch_size

    @property
    def latent_dim(self) -> int:
        """Numbers in one latent token (64 in the published model)."""
        return self.latent_patch_size**2 * self.autoencoder.latent_channels

    @property
    def max_image_size(self) -> int:
        """Longest side of a produced image, in pixels, that the latent position table has rows for."""
        return self.max_latent_size * self.token_pixels

    @property
    def vae_transform(self) -> ImageTransform:
        """The resize for images to be edited: 1024/512/16 as in the official `app.py`, or what the table allows."""
        stride = 16
        longest = max(stride, min(1024, self.max_image_size) // stride * stride)
        return ImageTransform(longest, min(512, longest), stride)

    @property
    def vit_transform(self) -> ImageTransform:
        """The resize for images to be understood: 980/224/14 as in `app.py`, or what the table allows."""
        longest = min(980, self.max_vit_patches * self.vit.patch_size)
        return ImageTransform(longest, min(224, longest), self.vit.patch_size)

    def to_dict(self) -> dict:
        """A form that json can hold; `from_dict` reads it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> BagelConfig:
        """The inverse of `to_dict`; raises KeyError or TypeError for what `to_dict` does not give."""
        autoencoder = dict(data["autoencoder"], widths=tuple(data["autoencoder"]["widths"]))
        parts = {
            "trunk": TrunkConfig(**data["trunk"]),
            "vit": VitConfig(**data["vit"]),
            "autoencoder": AutoencoderConfig(**autoencoder),
        }
        config = cls(**(data | parts))
        for part in (config, *parts.values()):
            for field in dataclasses.fields(part):
                value = getattr(part, field.name)
                if type(value).__name__ != field.type.split("[")[0]:
                    raise TypeError(f"{field.name} is {value!r}; it must be of type {field.type}")
        return config
