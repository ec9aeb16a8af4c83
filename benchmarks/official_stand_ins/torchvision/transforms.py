"""What the official `data/transforms.py` takes from torchvision, for PIL images, where torchvision uses PIL too."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image


class InterpolationMode(Enum):
    """The one way of resizing that is asked for."""

    BICUBIC = Image.Resampling.BICUBIC


class ToTensor:
    """An RGB image to `[3, H, W]` in [0, 1]."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Of one image."""
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)


class Normalize:
    """`(x - mean) / std` by channel."""

    def __init__(self, mean: list[float], std: list[float], inplace: bool = False):
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (mean, std))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Of `[C, H, W]`."""
        return (x - self.mean) / self.std


def _resize(image: Image.Image, size: tuple[int, int], interpolation: InterpolationMode, antialias: bool = True):
    return image.resize((size[1], size[0]), interpolation.value)


functional = SimpleNamespace(resize=_resize)
