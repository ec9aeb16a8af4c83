"""Writing a model in the published layout, which the official PyTorch code loads.

The way back of `load.py`, by the same name table: a parameter that is stacked over layers becomes a tensor a layer.
Arrays are read and written one parameter at a time.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bagel_jax.checkpoint.files import read_json
from bagel_jax.checkpoint.folder import copy_small_files, written
from bagel_jax.checkpoint.load import targets_of
from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.checkpoint.store import MANIFEST
from bagel_jax.checkpoint.table import AUTOENCODER, COMPONENTS, MAIN, Target
from bagel_jax.config import BagelConfig
from bagel_jax.errors import InputError
from bagel_jax.models.weights import Weights, flatten

_FILES = {MAIN: "ema.safetensors", AUTOENCODER: "ae.safetensors"}
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# What another model's json files may say that this module does not write but `sizes.py` reads.
_NOT_KEPT = ("llm_config", "vit_config", "rope_scaling", "rope_parameters")


@dataclass(frozen=True)
class StoredArray:
    """An array that is read when NumPy asks for its values."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], Any]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def stored_arrays(source: ModelSource) -> dict[str, StoredArray]:
    """Every parameter of a checkpoint by its path, in the dtype that it has there, for host memory.

    They are read a parameter at a time.
    """
    checkpoint = source.checkpoint
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    dtypes = {target.path: np.dtype(checkpoint.stored_dtype(target)) for target in checkpoint.targets}
    return {
        t.path: StoredArray(t.shape, dtypes[t.path], functools.partial(checkpoint.read, t, dtypes[t.path], cpu))
        for t in checkpoint.targets
    }


def export(
    weights: Weights | Mapping[str, Any],
    config: BagelConfig,
    tokenizer_directory: Path,
    destination: Path,
    dtype=None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a model in the published layout.

    `ema.safetensors`, `ae.safetensors`, `config.json`, `llm_config.json`, `vit_config.json` and the tokenizer's files.
    The sizes in the json files are those of `config`; other fields that the files of `tokenizer_directory` have are
    kept.

    Args:
        weights: the parameters; as a mapping, by dotted path, anything with shape, dtype and values for NumPy.
        config: the sizes.
        tokenizer_directory: where the tokenizer's files are.
        destination: a directory that is not there yet.
        dtype: of every tensor; None keeps that of each parameter.
        progress: called as `progress(parameters done, of how many)`.

    Raises:
        InputError: the destination is there already or cannot be written, the tokenizer's directory is none, or the
            weights are not those of such a model.
    """
    arrays = flatten(weights.params) if isinstance(weights, Weights) else weights
    targets = _checked_targets(arrays, config)
    dtypes = {path: np.dtype(jnp.dtype(array.dtype if dtype is None else dtype)) for path, array in arrays.items()}
    for path, kind in dtypes.items():
        if kind.name not in _DTYPES:
            raise InputError(f"parameter {path} has dtype {kind.name}; it must be one of {', '.join(_DTYPES)}")
    if not tokenizer_directory.is_dir():
        raise InputError(f"{tokenizer_directory} is not a directory; give the one with the tokenizer's files")
    jsons = json_files(config, dtypes["trunk.embed.embedding"].name)
    for name, fields in jsons.items():
        source_json = read_json(tokenizer_directory / name) if (tokenizer_directory / name).exists() else {}
        jsons[name] = {key: x for key, x in source_json.items() if key not in _NOT_KEPT} | fields
    # Wider types first, so that every tensor is aligned in its file; a component in one go, for it may be read so.
    targets.sort(key=lambda t: (-dtypes[t.path].itemsize, COMPONENTS.index(t.row.component)))
    done = 0

    def tensors(target: Target) -> Iterator[np.ndarray]:
        nonlocal done
        yield from _tensors(target, np.asarray(arrays[target.path]), dtypes[target.path])
        done += 1
        if progress is not None:
            progress(done, len(targets))

    with written(destination) as folder:
        copy_small_files(tokenizer_directory, folder, (MANIFEST, *jsons))
        for name, fields in jsons.items():
            (folder / name).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        for kind, name in _FILES.items():
            group = [target for target in targets if target.row.file == kind]
            header = {
                source: (dtypes[target.path], target.source_shape) for target in group for source in target.sources
            }
            _write_tensors(folder / name, header, (tensor for target in group for tensor in tensors(target)))


def json_files(config: BagelConfig, dtype: str) -> dict[str, dict[str, Any]]:
    """The fields of each json file that the official code reads, for a model whose trunk is stored in `dtype`.

    Raises:
        InputError: the layout cannot tell such a model.
    """
    trunk, vit, autoencoder = config.trunk, config.vit, config.autoencoder
    side = math.isqrt(vit.num_positions)
    if side**2 != vit.num_positions:
        raise InputError(
            f"the ViT's position table has {vit.num_positions} rows; published, it must be a square number"
        )
    top = {
        "architectures": ["BagelForConditionalGeneration"],
        "model_type": "bagel",
        "visual_gen": True,
        "visual_und": True,
        "connector_act": config.connector_activation,
        "interpolate_pos": config.interpolate_positions,
        "latent_patch_size": config.latent_patch_size,
        "max_latent_size": config.max_latent_size,
        "timestep_shift": 1.0,
        "vit_max_num_patch_per_side": config.max_vit_patches,
        "vae_config": {
            "downsample": autoencoder.downsample,
            "z_channels": autoencoder.latent_channels,
            "scale_factor": autoencoder.scale_factor,
            "shift_factor": autoencoder.shift_factor,
        },
    }
    llm = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "head_dim": trunk.head_dim,
        "hidden_act": trunk.activation,
        "hidden_size": trunk.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": trunk.mlp_width,
        "max_position_embeddings": 32768,
        "max_window_layers": trunk.num_layers,
        "model_type": "qwen2",
        "num_attention_heads": trunk.num_heads,
        "num_hidden_layers": trunk.num_layers,
        "num_key_value_heads": trunk.num_kv_heads,
        "rms_norm_eps": trunk.norm_eps,
        "rope_theta": trunk.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": trunk.vocab_size,
    }
    vision = {
        "hidden_size": vit.hidden_size,
        "image_size": side * vit.patch_size,
        "intermediate_size": vit.mlp_width,
        "model_type": "siglip_vision_model",
        "num_attention_heads": vit.num_heads,
        "num_hidden_layers": vit.num_layers + 1,  # the official code takes one off
        "patch_size": vit.patch_size,
        "num_channels": vit.channels,
        "layer_norm_eps": vit.norm_eps,
        "hidden_act": vit.activation,
        "attention_dropout": 0.0,
    }
    return {"config.json": top, "llm_config.json": llm, "vit_config.json": vision}


def _checked_targets(arrays: Mapping[str, Any], config: BagelConfig) -> list[Target]:
    """The targets of a model of these sizes; raises `InputError` unless `arrays` are its parameters."""
    targets = targets_of(config)
    for target in targets:
        if target.path not in arrays:
            raise InputError(f"parameter {target.path} is missing; a model of these sizes has it")
        if (shape := tuple(arrays[target.path].shape)) != target.shape:
            raise InputError(
                f"parameter {target.path} has shape {list(shape)}; a model of these sizes needs {list(target.shape)}"
            )
    if unexpected := arrays.keys() - {target.path for target in targets}:
        raise InputError(f"parameter {min(unexpected)} is unexpected; a model of these sizes has none of that name")
    return targets


def _tensors(target: Target, values: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    """What `PublishedCheckpoint.read` makes `values` of: one tensor, or one a layer."""
    for value in values if target.row.stacked else values[None]:
        yield np.ascontiguousarray(target.to_source(value), dtype)


def _write_tensors(
    path: Path, header: Mapping[str, tuple[np.dtype, tuple[int, ...]]], tensors: Iterator[np.ndarray]
) -> None:
    """A safetensors file, a tensor at a time, for which the library's own writer wants all of them in memory.

    Args:
        path: the file.
        header: dtype and shape of each tensor, in the order of `tensors`.
        tensors: C-contiguous values.

    Raises:
        InputError: the file cannot be written.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in header.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _DTYPES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8
    try:
        with path.open("wb") as file:
            file.seek(8 + len(text))
            for tensor in tensors:
                file.write(tensor.reshape(-1).view(np.uint8))
            # Last, so that a file that was not finished is none.
            file.seek(0)
            file.write(len(text).to_bytes(8, "little") + text)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); make room or give another place") from None
