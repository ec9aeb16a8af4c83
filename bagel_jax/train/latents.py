"""Images encoded ahead of training: the autoencoder is frozen while the model learns, so each is encoded once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from bagel_jax.config import BagelConfig
from bagel_jax.inputs.images import prepare_image
from bagel_jax.models.weights import Weights, flatten
from bagel_jax.request import open_image

_INDEX = "index.json"
_PIXELS = 2**18  # encoded at a time,
_MOST = 64  # and in so many images, for each makes the program longer
_READ_AHEAD = 64  # images


@dataclass
class LatentStore:
    """Moments of encoded images on disk, one file a shape: mean and deviation in float16, `[n, h, w, 2, C]`.

    Half precision's error, 5e-4 of a value, is far below the posterior's own spread.
    """

    folder: Path
    index: dict[str, tuple[str, int]]  # path of an image -> file, row
    _open: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __getstate__(self):
        return {"folder": self.folder, "index": self.index, "_open": {}}  # each worker maps the files itself

    def read(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of an image's posterior, each `[h, w, C]` float32."""
        file, row = self.index[path]
        if file not in self._open:
            self._open[file] = np.load(self.folder / file, mmap_mode="r")
        mean, deviation = np.moveaxis(self._open[file][row].astype(np.float32), 2, 0)
        return mean, deviation


@partial(jax.jit, static_argnames="graph")
def moments(graph, params, pixels):
    """`[B, H, W, 3]` -> `[B, h, w, 2, C]` float16."""
    mean, log_variance = nnx.merge(graph, params).autoencoder.moments(pixels)
    return jnp.stack([mean, jnp.exp(0.5 * log_variance)], axis=-2).astype(jnp.float16)


def encode_images(
    paths: Sequence[str], weights: Weights, config: BagelConfig, cache: Path, *, quiet: bool = False
) -> LatentStore:
    """Encodes every image that is not in the cache yet.

    A shape is compiled once, so images of a few sizes are encoded fast and of a thousand slowly.

    Args:
        paths: the images.
        weights: the model; its autoencoder is used.
        config: the model's sizes.
        cache: folder to keep them in; each autoencoder and size of images has its own subfolder.
        quiet: no progress bar.

    Raises:
        InputError: an image cannot be read.
    """
    folder = cache / _fingerprint(weights, config)
    folder.mkdir(parents=True, exist_ok=True)
    known = json.loads((folder / _INDEX).read_text()) if (folder / _INDEX).exists() else {}
    keys = {path: f"{path}:{Path(path).stat().st_mtime_ns}" for path in paths if Path(path).is_file()}
    missing = [path for path in paths if keys.get(path) not in known]

    def batch(shape):
        return max(1, min(_MOST, len(missing), _PIXELS // (shape[0] * shape[1])))

    def read(path):
        return prepare_image(open_image(path), config).vae_pixels

    found: dict[str, list[np.ndarray]] = {}
    names: dict[str, list[str]] = {}
    waiting: dict[tuple[int, ...], list[tuple[str, np.ndarray]]] = {}

    def flush(shape):
        some = waiting.pop(shape)
        pixels = np.zeros((batch(shape), *shape), np.float32)
        pixels[: len(some)] = [p for _, p in some]
        out = np.asarray(moments(weights.graph, weights.params, pixels))[: len(some)]
        found.setdefault(f"{shape[0]}x{shape[1]}", []).append(out)
        names.setdefault(f"{shape[0]}x{shape[1]}", []).extend(path for path, _ in some)

    with ThreadPoolExecutor() as pool, tqdm(total=len(missing), desc="encoding", unit="image", disable=quiet) as bar:
        for start in range(0, len(missing), _READ_AHEAD):
            some = missing[start : start + _READ_AHEAD]
            for path, array in zip(some, pool.map(read, some), strict=True):
                waiting.setdefault(array.shape, []).append((path, array))
                if len(waiting[array.shape]) == batch(array.shape):
                    flush(array.shape)
                bar.update()
    for shape in list(waiting):
        flush(shape)
    for shape, parts in found.items():
        file = f"{shape}.{len(list(folder.glob(f'{shape}.*.npy')))}.npy"
        np.save(folder / file, np.concatenate(parts))
        known |= {keys[path]: (file, row) for row, path in enumerate(names[shape])}
    unfinished = folder / f"{_INDEX}.unfinished"
    unfinished.write_text(json.dumps(known))
    unfinished.replace(folder / _INDEX)  # whole or not at all
    return LatentStore(folder, {path: tuple(known[keys[path]]) for path in paths})


def _fingerprint(weights: Weights, config: BagelConfig) -> str:
    # Images are turned upright and resized before they are encoded; what was encoded lying is another's.
    digest = hashlib.sha256(f"upright {config.vae_transform!r}".encode())
    for name, array in sorted(flatten(weights.params).items()):
        if name.startswith("autoencoder.encoder"):
            digest.update(name.encode() + np.asarray(array, np.float32).tobytes())
    return digest.hexdigest()[:16]
