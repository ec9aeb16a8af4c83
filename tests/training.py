"""Training at toy sizes: a model smaller than `small.py`'s, drawn images, records, configurations."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from small import CONFIG, TOKENIZER, drawn
from small import random_image as random_image
from tensorboardX.proto import event_pb2

from bagel_jax.checkpoint.export import export
from bagel_jax.config import BagelConfig
from bagel_jax.models.weights import Weights, abstract_weights
from bagel_jax.train.config import TrainConfig, read_train_config
from bagel_jax.train.packing import Batch, TextPart, VaePart, VitPart, lay_out, pack

# Images of 16 pixels are 16 latent tokens, and 4 patches for the ViT.
TINY = dataclasses.replace(
    CONFIG,
    trunk=dataclasses.replace(CONFIG.trunk, hidden_size=16, num_heads=2, num_kv_heads=1, mlp_width=24),
    vit=dataclasses.replace(
        CONFIG.vit, hidden_size=16, num_layers=1, num_heads=2, mlp_width=16, num_positions=4, patch_size=7
    ),
    max_latent_size=4,
    max_vit_patches=2,
    time_frequencies=8,
)
MARKERS = (700, 701)  # any two ids, where no tokenizer is at hand
DIMS = {"patch_dim": 3 * TINY.vit.patch_size**2, "latent_dim": TINY.latent_dim}
_MADE = tempfile.TemporaryDirectory(prefix="bagel_jax_tiny_")


@functools.cache
def tiny_weights(config: BagelConfig = TINY) -> Weights:
    """The tiny model, or one of other sizes, with random weights."""
    abstract = abstract_weights(config, jnp.float32)
    return Weights(abstract.graph, drawn(abstract.params))


@functools.cache
def tiny_checkpoint(config: BagelConfig = TINY) -> Path:
    """The same as a checkpoint, from which a run starts faster than from a new model."""
    folder = Path(_MADE.name) / str(tiny_checkpoint.cache_info().misses)
    export(tiny_weights(config), config, TOKENIZER, folder)
    return folder


def full_batch() -> Batch:
    """Two rows of a sample with everything in it, and the axis of accumulation in front."""

    def row(seed):
        generator = np.random.RandomState(seed)
        latents = generator.standard_normal((3, 4, TINY.latent_dim)).astype(np.float32)
        patches = generator.standard_normal((4, DIMS["patch_dim"])).astype(np.float32)
        parts = [
            VitPart(patches, np.arange(4)),
            TextPart((5, 6, 7)),
            TextPart(tuple(generator.randint(0, 700, 6).tolist()), loss=True),
            VaePart(latents[0], np.arange(4)),
            VaePart(latents[1], np.arange(4), 0.6, latents[2]),
        ]
        return lay_out(parts, MARKERS, **DIMS)

    batch = Batch.of(pack([[row(0)], [row(1)]], {"text": 18, "vit": 6, "latent": 10}))
    return jax.tree.map(lambda x: x[None], batch)


def draw_images(folder: Path, count: int = 4, size: tuple[int, int] = (16, 16)) -> list[str]:
    """Images of noise in a folder; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i}_{size[0]}x{size[1]}.png" for i in range(count)]
    for i, name in enumerate(names):
        random_image(i, *size).save(folder / name)
    return names


def write_records(path: Path, records: list[list[dict[str, Any]]]) -> str:
    """A JSONL file of records, each a list of segments; returns its path."""
    path.write_text("".join(json.dumps({"segments": segments}) + "\n" for segments in records), encoding="utf-8")
    return str(path)


def write_data(folder: Path) -> tuple[str, str]:
    """Two files of records in a folder, of edits and of texts, and their images; returns their paths."""
    names = draw_images(folder)
    edits = [
        [{"image": a, "as": "both"}, {"text": f"edit {i}"}, {"image": b, "target": True}]
        for i, (a, b) in enumerate(zip(names, names[1:] + names[:1], strict=True))
    ]
    texts = [
        [{"image": name, "as": "vit"}, {"text": "what?"}, {"text": f"a {i}", "target": True}]
        for i, name in enumerate(names)
    ]
    return write_records(folder / "edits.jsonl", edits), write_records(folder / "texts.jsonl", texts)


def toml(value: Any) -> str:
    """A value as TOML; tables come out on one line, without what is None."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml(x)}" for name, x in value.items() if x is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value)


def write_toml(path: Path, tables: dict[str, Any]) -> Path:
    """A TOML file."""
    lines = [f"{name} = {toml(value)}\n" for name, value in tables.items() if value is not None]
    path.write_text("".join(lines), encoding="utf-8")
    return path


NEW = {"start": None, "sizes": TINY.to_dict(), "tokenizer": str(TOKENIZER)}  # `model` of a run that starts from nothing


# A run whose checkpoints hold all that there can be.
SIX_STEPS = {
    "optimizer": {"accumulate": 2, "weight_decay": 0.1, "max_grad_norm": 1.0},
    "run": {"steps": 6, "save_every": 3},
}


def tables(output: Path, sources: list[str], /, **changes: dict[str, Any]) -> dict[str, Any]:
    """A small run's tables: four rows, three steps of the tiny model; `changes` are laid over each table."""
    base: dict[str, Any] = {
        "output": str(output),
        "model": {"start": str(tiny_checkpoint())},
        "data": {
            "sources": [{"path": source} for source in sources],
            "rows": 4,
            "text_tokens": 32,
            "vit_tokens": 8,
            "latent_tokens": 32,
            "crop": 16,
        },
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0, "ema": 0.9, "epsilon": 1e-8},
        "run": {"steps": 3, "save_every": 1000, "log_every": 1},
    }
    for name, change in changes.items():
        base[name] = base.get(name, {}) | change if isinstance(change, dict) else change
    return base


def write_config(folder: Path, **changes: dict[str, Any]) -> tuple[TrainConfig, Path]:
    """A small run of edits and texts in a folder, its data drawn; the configuration and its file."""
    sources = list(write_data(folder / "data"))
    path = write_toml(folder / "train.toml", tables(folder / "run", sources, **changes))
    return read_train_config(path), path


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars of TensorBoard's files in a folder: by name, by step."""
    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events.*")):
        raw, at = file.read_bytes(), 0
        while at < len(raw):  # length, its checksum, the event, its checksum
            size = int(np.frombuffer(raw, "<u8", 1, at)[0])
            event = event_pb2.Event.FromString(raw[at + 12 : at + 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
            at += 16 + size
    return found
