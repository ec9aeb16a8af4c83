"""JSONL records to packed rows, through grain: shuffled, mixed, repeated without end, resumable at any batch.

One record a line: `{"segments": [...]}`, each segment one of

- `{"text": "…"}`: a text; with `"target": true` it is learned, with `"drop": false` never left out;
- `{"image": "path", "as": "vit" | "vae" | "both"}`: an image to understand, to edit, or both, in the official order;
- `{"image": "path", "target": true}`: an image to produce.

Paths are relative to the JSONL file. In records that produce an image, each other text and image is left out now
and then (`objective.*_dropout`), so that the model learns the contexts which guidance compares.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from bagel_jax.config import BagelConfig
from bagel_jax.errors import InputError
from bagel_jax.inputs.images import InputImage, prepare_image
from bagel_jax.inputs.prepare import latent_positions, vit_positions
from bagel_jax.inputs.tokenizer import Tokenizer
from bagel_jax.layout import Gap
from bagel_jax.request import open_image
from bagel_jax.train.config import DataTable, ObjectiveTable
from bagel_jax.train.latents import LatentStore
from bagel_jax.train.packing import Part, Sample, TextPart, VaePart, VitPart, lay_out, pack

# So many samples, one after the other, that are longer than a row end a run.
_TOO_LONG = 1000


class Records:
    """The lines of a JSONL file by number, for grain.

    Raises:
        InputError: the file cannot be read, is empty, or a line of it is no record.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
        except OSError as error:
            raise InputError(f"data source {path} cannot be read ({error.strerror}); give a JSONL file") from None
        if not self._lines:
            raise InputError(f"data source {path} holds no record; it must hold one a line")
        for i in range(len(self)):
            self._check(i)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        """The segments of one record, images with whole paths."""
        segments = json.loads(self._lines[index])["segments"]
        return [s | {"image": str(self.path.parent / s["image"])} if "image" in s else s for s in segments]

    def __repr__(self) -> str:
        return f"Records({str(self.path)!r})"  # grain keeps it in checkpoints

    def _check(self, index: int) -> None:
        try:
            segments = json.loads(self._lines[index])["segments"]
            good = isinstance(segments, list) and len(segments) > 0 and all(map(_is_segment, segments))
        except (ValueError, KeyError, TypeError, AttributeError):
            good = False
        if not good:
            raise InputError(
                f"record {index + 1} of {self.path} is {self._lines[index][:80]!r}; it must be an object with "
                "segments, each with a text, or with an image and either target or as (vit, vae or both)"
            )

    def images(self) -> dict[str, str]:
        """Path and role (`vit` or `vae`) of every image; `vae` where it is encoded at all."""
        found: dict[str, str] = {}
        for i in range(len(self)):
            for segment in self[i]:
                if "image" in segment and (_role(segment) != "vit" or segment["image"] not in found):
                    found[segment["image"]] = "vit" if _role(segment) == "vit" else "vae"
        return found


def _is_segment(s) -> bool:
    flags_are_bool = all(isinstance(s.get(name, True), bool) for name in ("target", "drop"))
    is_image = isinstance(s.get("image"), str) and _role(s) is not None
    return flags_are_bool and (isinstance(s.get("text"), str) or is_image)


def _role(segment) -> str | None:
    if segment.get("target") is True:
        return "target"
    return segment.get("as") if segment.get("as") in ("vit", "vae", "both") else None


@dataclass(frozen=True)
class Sampler:
    """A record to a laid-out sample; grain calls it in its workers."""

    config: BagelConfig
    tokenizer: Tokenizer
    objective: ObjectiveTable
    latents: LatentStore

    def __call__(self, record: list[dict[str, Any]], rng: np.random.Generator) -> Sample:
        """The sample, its dropouts, timesteps and noise drawn from `rng`."""
        o = self.objective
        conditional = any(_role(s) == "target" for s in record if "image" in s)
        parts: list[Part] = []
        silent = False
        for segment in record:
            dropouts = conditional and segment.get("target") is not True and segment.get("drop") is not False
            if "text" in segment:
                # What was to follow from a text that is left out (the plan of an image) goes with it.
                silent = silent or (dropouts and rng.random() < o.text_dropout)
                if silent and conditional and segment.get("drop") is not False:
                    continue
                parts.append(TextPart(self.tokenizer.prompt(segment["text"]), segment.get("target") is True))
                continue
            path, role = segment["image"], _role(segment)
            if role == "target":
                parts.append(self._noised(path, rng))
            if role in ("vae", "both"):
                dropped = dropouts and rng.random() < o.vae_dropout
                parts.append(Gap(1) if dropped else VaePart(*self._encoded(path, rng)))
            if role in ("vit", "both"):
                dropped = dropouts and rng.random() < o.vit_dropout
                parts.append(Gap(1) if dropped else self._vit(path))
        c = self.config
        return lay_out(
            parts,
            self.tokenizer.special.markers,
            patch_dim=c.vit.channels * c.vit.patch_size**2,
            latent_dim=c.latent_dim,
            ce_power=o.ce_power,
        )

    def _vit(self, path: str) -> VitPart:
        image = read_image(path, self.config)
        return VitPart(image.vit_patches, vit_positions(image, self.config))

    def _encoded(self, path: str, rng) -> tuple[np.ndarray, np.ndarray]:
        """Latent tokens of an image, a new sample of the posterior, and their positions."""
        mean, deviation = self.latents.read(path)
        c, a, p = self.config, self.config.autoencoder, self.config.latent_patch_size
        z = mean + deviation * rng.standard_normal(mean.shape, np.float32)
        z = a.scale_factor * (z - a.shift_factor)
        rows, columns = z.shape[0] // p, z.shape[1] // p
        tokens = z[: rows * p, : columns * p].reshape(rows, p, columns, p, -1).transpose(0, 2, 1, 3, 4)
        return tokens.reshape(rows * columns, c.latent_dim), latent_positions((rows, columns), c)

    def _noised(self, path: str, rng) -> VaePart:
        latents, positions = self._encoded(path, rng)
        t, shift = 1 / (1 + np.exp(-rng.standard_normal())), self.objective.timestep_shift
        t = shift * t / (1 + (shift - 1) * t)
        return VaePart(latents, positions, float(t), rng.standard_normal(latents.shape, np.float32))


def read_image(path: str, config: BagelConfig) -> InputImage:
    """An image file as the model takes it.

    Raises:
        InputError: it cannot be read.
    """
    return prepare_image(open_image(path), config)


def mixture(sources: list[Records], weights: list[float], seed: int, shard: tuple[int, int]) -> grain.MapDataset:
    """Records without end, each source shuffled anew every round, drawn in proportion to the weights.

    Args:
        sources: the files.
        weights: how often each is read, relative to the others.
        seed: of the shuffling.
        shard: this process's number, and how many there are.
    """
    parts = []
    for source in sources:
        part = grain.MapDataset.source(source)
        if shard[1] > 1:
            part = part[shard[0] :: shard[1]]
        parts.append(part.seed(seed).shuffle().repeat())
    total = sum(weights)
    return grain.MapDataset.mix(parts, [w / total for w in weights]) if len(parts) > 1 else parts[0]


def packed_rows(
    records: grain.MapDataset, sampler: Sampler, data: DataTable, rows: int, seed: int
) -> grain.IterDataset:
    """Batches of `rows` packed rows, as `Batch.of` takes them."""
    places = {"text": data.text_tokens, "vit": data.vit_tokens, "latent": data.latent_tokens}
    # Read where it is needed: what runs ahead is whole batches, made by `prefetched`.
    samples = records.seed(seed).random_map(sampler).to_iter_dataset(grain.ReadOptions(num_threads=0))
    return prefetched(FirstFit(samples, places, rows), data)


class FirstFit(grain.IterDataset):
    """Batches of packed rows: each sample goes into the first row with room for it.

    A batch ends with the first sample that fits nowhere; it begins the next. So where the data stands between batches
    is told by one sample's number. (grain's own first-fit packing copies each array of a sample on its own and took
    twice the time of everything else together.) Samples longer than a row are passed over, as in the official code.

    Args:
        parent: samples (`packing.lay_out`).
        places: the number of places of each kind in a row.
        rows: rows in a batch.
    """

    def __init__(self, parent: grain.IterDataset, places: dict[str, int], rows: int):
        super().__init__(parent)
        self._places, self._rows = places, rows

    def __iter__(self) -> grain.DatasetIterator:
        return _FirstFitIterator(self._parent.__iter__(), self._places, self._rows)


class _FirstFitIterator(grain.DatasetIterator):
    def __init__(self, parent, places: dict[str, int], rows: int):
        super().__init__(parent)
        self._places, self._rows = places, rows
        self._carried: Sample | None = None
        self._start = parent.get_state()  # of the parent, before the next batch's first sample

    def __next__(self) -> dict[str, np.ndarray]:
        kinds = list(self._places)
        room = np.tile([self._places[kind] for kind in kinds], (self._rows, 1))
        whole = room[0].copy()
        rows: list[list[Sample]] = [[] for _ in range(self._rows)]
        passed_over = 0
        while True:
            before = self._start if self._carried is not None else self._parent.get_state()
            sample = self._carried if self._carried is not None else next(self._parent)
            self._carried = None
            size = np.array([len(sample[kind]) for kind in kinds])
            if (size > whole).any():
                passed_over += 1
                if passed_over == _TOO_LONG:
                    asked = ", ".join(f"{n} {kind}_tokens" for kind, n in zip(kinds, size.tolist(), strict=True))
                    raise InputError(
                        f"{_TOO_LONG} samples in a row do not fit into any row; the last one needs {asked}, and data "
                        f"has {', '.join(f'{n} {kind}_tokens' for kind, n in self._places.items())}"
                    )
                continue
            passed_over = 0
            fits = (room >= size).all(axis=1)
            if not fits.any():
                self._carried, self._start = sample, before
                return pack(rows, self._places)
            row = int(fits.argmax())
            room[row] -= size
            rows[row].append(sample)

    def get_state(self) -> dict[str, Any]:
        """Where the next batch begins."""
        return {"parent": self._start}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called."""
        self._parent.set_state(state["parent"])
        self._carried, self._start = None, state["parent"]


def prefetched(batches: grain.IterDataset, data: DataTable) -> grain.IterDataset:
    """Made ahead, by `data.workers` processes or by a thread of this one."""
    if data.workers:
        if not flags.FLAGS.is_parsed():  # grain's workers ask for its flags, which no command of ours has
            flags.FLAGS.mark_as_parsed()
        return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=2))
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)


@dataclass(frozen=True)
class Cropper:
    """An image's path to a square of its pixels `[crop, crop, 3]` in [-1, 1], cut out at random."""

    config: BagelConfig
    crop: int

    def __call__(self, path: str, rng: np.random.Generator) -> np.ndarray:
        """The square; raises `InputError` where the image is smaller."""
        pixels = read_image(path, self.config).vae_pixels
        spare = pixels.shape[0] - self.crop, pixels.shape[1] - self.crop
        if min(spare) < 0:
            raise InputError(
                f"image {path} has {pixels.shape[1]}x{pixels.shape[0]} pixels after its resize; data.crop is "
                f"{self.crop} and must not be more"
            )
        top, left = (int(rng.integers(0, n + 1)) for n in spare)
        return pixels[top : top + self.crop, left : left + self.crop]
