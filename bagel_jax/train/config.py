"""What a training run is, read from a TOML file. Every field is described here; unknown ones are errors."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from bagel_jax.config import BagelConfig
from bagel_jax.errors import InputError, read

Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]

# In a run's output folder.
CONFIG_COPY, CHECKPOINTS = "config.toml", "checkpoints"

# Short names of the components in checkpoint/table.py.
COMPONENT_NAMES = {
    "embedding": "embedding and head",
    "und_expert": "understanding expert",
    "gen_expert": "generation expert",
    "vit": "vit",
    "connectors": "connectors and positions",
    "autoencoder": "autoencoder",
}
Component = Literal["embedding", "und_expert", "gen_expert", "vit", "connectors", "autoencoder"]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file."""


class ModelTable(_Table, kw_only=True):
    """What is trained: `start` from a checkpoint, or `sizes` and a `tokenizer` for a new model."""

    start: str | None = None  # anything that `bagel_jax.run --model` loads
    sizes: BagelConfig | None = None
    tokenizer: str | None = None  # a folder with the tokenizer's files
    freeze: tuple[Component, ...] = ()


class ObjectiveTable(_Table, kw_only=True):
    """The loss. `kind` bagel: texts and images; autoencoder: reconstruction and KL, of the autoencoder alone."""

    kind: Literal["bagel", "autoencoder"] = "bagel"
    ce_weight: NotNegative = 1.0
    mse_weight: NotNegative = 1.0
    ce_power: Share = 0.0  # weight of a token: its answer's length ** -ce_power (packing.lay_out)
    timestep_shift: Positive = 1.0  # above 1: more noise
    text_dropout: Share = 0.1  # each condition of an image is left out this often, which guidance needs
    vit_dropout: Share = 0.3
    vae_dropout: Share = 0.3
    kl_weight: NotNegative = 1e-4  # autoencoder, this and the rest
    corner_weight: Positive = 1.0  # of the four corner pixels, which zero padding spoils
    latent_noise: NotNegative = 0.0  # decode latents with up to this much noise on them (in their own deviations)
    normalize: bool = True  # scale each latent channel to unit variance when exporting


class SourceTable(_Table, kw_only=True):
    """One JSONL file (data.py has its form), read `weight` times as often as one of weight 1."""

    path: str
    weight: Positive = 1.0


class DataTable(_Table, kw_only=True):
    """What is trained on, and in what rows."""

    sources: Annotated[tuple[SourceTable, ...], Meta(min_length=1)]
    rows: Count = 1  # B, of one step and over all devices
    text_tokens: Count = 1024  # places for each kind of token in a row
    vit_tokens: Count = 4900
    latent_tokens: Count = 8192
    crop: Count = 256  # autoencoder: side in pixels of the square that is cut out of each image
    workers: Whole = 0  # processes that read; 0: threads of this one
    cache: str | None = None  # folder for encoded images; default: `latents` in the output folder


class OptimizerTable(_Table, kw_only=True):
    """AdamW with warm-up; defaults are the official ones."""

    learning_rate: Positive = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Whole = 2000
    min_learning_rate: NotNegative = 1e-7  # where cosine ends
    beta1: Share = 0.9
    beta2: Share = 0.95
    epsilon: Positive = 1e-15
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 1.0
    accumulate: Count = 1  # batches a step
    ema: Share = 0.9999  # decay of the averaged weights, which are what is exported


class LoraTable(_Table, kw_only=True):
    """Low-rank adapters in place of the weights themselves; everything else is frozen."""

    rank: Count = 16
    alpha: Positive = 16.0  # the adapter's product is scaled by alpha / rank
    projections: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = ("q", "k", "v", "o")
    experts: tuple[Literal["und", "gen"], ...] = ("und", "gen")


class MeshTable(_Table, kw_only=True):
    """Devices: `data` copies of the model, each cut into `fsdp` parts. 0: all that are left."""

    data: Whole = 1
    fsdp: Whole = 0


class RunTable(_Table, kw_only=True):
    """How long, and what is kept."""

    steps: Count
    save_every: Count = 1000
    keep: Count = 3
    log_every: Count = 10
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the computation; weights and optimizer are float32
    remat: bool = True  # keep only each layer's input for the backward pass
    peak_tflops: Positive | None = None  # of one device, for MFU; None: known for usual chips


class TrainConfig(_Table, kw_only=True):
    """A whole configuration."""

    output: str
    seed: Whole = 0
    model: ModelTable
    objective: ObjectiveTable = ObjectiveTable()
    data: DataTable
    optimizer: OptimizerTable = OptimizerTable()
    lora: LoraTable | None = None
    mesh: MeshTable = MeshTable()
    run: RunTable


def is_run(folder: Path) -> bool:
    """Whether a folder is the output of a training run."""
    return (folder / CONFIG_COPY).is_file() and (folder / CHECKPOINTS).is_dir()


def read_train_config(path: Path) -> TrainConfig:
    """Reads and checks a file. Paths in it are relative to the folder that the command runs in.

    Raises:
        InputError: no such file, no TOML, or a field that is unknown, missing or out of range.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); give a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML ({error}); correct that line") from None
    try:
        config = read(data, TrainConfig)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    _check(path, config)
    return config


def _check(path: Path, c: TrainConfig) -> None:
    if (c.model.start is None) == (c.model.sizes is None):
        raise InputError(f"{path}: give one of model.start and model.sizes, and not both")
    if c.model.sizes is not None and c.model.tokenizer is None:
        raise InputError(f"{path}: model.sizes is given without model.tokenizer; a new model needs both")
    if c.lora is not None and c.objective.kind != "bagel":
        raise InputError(f"{path}: lora is given for objective.kind {c.objective.kind!r}; it must be 'bagel'")
    if c.optimizer.schedule == "cosine" and c.optimizer.warmup_steps >= c.run.steps:
        raise InputError(
            f"{path}: optimizer.warmup_steps is {c.optimizer.warmup_steps}; it must be below run.steps, {c.run.steps}"
        )
