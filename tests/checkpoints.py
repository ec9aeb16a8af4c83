"""Checkpoints made for tests: real headers over real values, or over a hole that takes no disk space."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np

DATA = Path(__file__).parent / "data"
FILES = {"ema": "ema.safetensors", "ae": "ae.safetensors"}
INDEX = "model.safetensors.index.json"
_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8}

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, np.ndarray]


def _header(shapes: Shapes, dtypes: dict[str, str]) -> tuple[bytes, int]:
    """The bytes before the data, and the size of the data."""
    entries, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * _BYTES[dtypes[name]]
        entries[name] = {"dtype": dtypes[name], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def write_holes(path: Path, shapes: Shapes, dtype: str = "BF16") -> None:
    """A safetensors file whose data is a hole: it reads as zeros and takes no space."""
    header, size = _header(shapes, dict.fromkeys(shapes, dtype))
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)


def write_tensors(path: Path, tensors: Tensors) -> None:
    """A safetensors file."""
    dtypes = {name: _NAMES[x.dtype.name] for name, x in tensors.items()}
    header, _ = _header({name: x.shape for name, x in tensors.items()}, dtypes)
    with path.open("wb") as file:
        file.write(header)
        for x in tensors.values():
            file.write(np.ascontiguousarray(x).tobytes())


def read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file, read without the library."""
    kinds = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(raw[begin:end], kinds[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def copy(source: Path, destination: Path) -> Path:
    """A checkpoint of its own, to be damaged."""
    return Path(shutil.copytree(source, destination))


def edit_json(path: Path, **changes) -> None:
    """Sets fields of a json file; a field set to `...` is removed."""
    data = json.loads(path.read_text()) if path.exists() else {}
    data |= changes
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not ...}))


def edit_tensors(path: Path, **changes: np.ndarray | None) -> None:
    """Sets tensors of a safetensors file; None removes one."""
    tensors = read_tensors(path) | changes
    write_tensors(path, {name: x for name, x in tensors.items() if x is not None})


def shard(directory: Path) -> dict[str, str]:
    """Puts the model of a checkpoint into two shards and an index; returns the index's weight_map.

    Layers with even numbers go to another shard than those with odd ones, so the parts of one parameter lie in both.
    """
    single = directory / FILES["ema"]
    tensors = read_tensors(single)
    single.unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {tensor: names[sum(tensor.encode()) % 2] for tensor in tensors}
    for name in names:
        write_tensors(directory / name, {n: x for n, x in tensors.items() if weight_map[n] == name})
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: object) -> None:
    """The index of a sharded checkpoint."""
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def official_shapes(kind: str) -> Shapes:
    """Shape of every tensor of the published model (`ema`) or its autoencoder (`ae`)."""
    shapes = json.loads((DATA / "official" / f"{kind}.shapes.json").read_text())
    return {name: tuple(shape) for name, shape in shapes.items()}


def write_official(directory: Path, ema: Shapes | None = None) -> Path:
    """The published checkpoint with holes for weights; 29 GB that take no space."""
    directory.mkdir()
    write_holes(directory / FILES["ema"], official_shapes("ema") if ema is None else ema, "BF16")
    write_holes(directory / FILES["ae"], official_shapes("ae"), "F32")
    for name in ("llm_config.json", "vit_config.json"):
        shutil.copyfile(DATA / "official" / name, directory / name)
    edit_json(directory / "config.json", max_latent_size=32)
    return directory


def write_medium(directory: Path, dtype: str) -> int:
    """A model of 110 M parameters, none above a tenth of it, with holes for weights; returns how many parameters.

    The published shapes with smaller numbers in them: 4 query heads on one key-value head, 20 layers, 2 of the ViT.
    """
    directory.mkdir()
    sizes = {152064: 16384, 3584: 512, 512: 128, 18944: 1024, 1152: 64, 4304: 128}
    dropped = [f"language_model.model.layers.{i}." for i in range(20, 28)]
    dropped += [f"vit_model.vision_model.encoder.layers.{i}." for i in range(2, 26)]
    shapes = {
        name: tuple(sizes.get(n, n) for n in shape)
        for name, shape in official_shapes("ema").items()
        if not name.startswith(tuple(dropped))
    }
    autoencoder = autoencoder_shapes(32, (32, 32, 64, 64), 1, 16)
    write_holes(directory / FILES["ema"], shapes, dtype)
    write_holes(directory / FILES["ae"], autoencoder, dtype)
    for name in ("llm_config.json", "vit_config.json"):
        shutil.copyfile(DATA / "official" / name, directory / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DATA / "tiny-bagel" / name, directory / name)
    edit_json(
        directory / "llm_config.json",
        vocab_size=16384,
        hidden_size=512,
        num_hidden_layers=20,
        num_attention_heads=4,
        num_key_value_heads=1,
        intermediate_size=1024,
    )
    edit_json(
        directory / "vit_config.json",
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
    )
    return sum(math.prod(shape) for shape in [*shapes.values(), *autoencoder.values()])


def autoencoder_shapes(base: int, widths: tuple[int, ...], blocks: int, latents: int) -> Shapes:
    """Tensors of a FLUX autoencoder of any size, as the official `modeling/autoencoder.py` builds it."""
    shapes: Shapes = {}

    def conv(name, width_in, width_out, size=3):
        shapes[f"{name}.weight"] = (width_out, width_in, size, size)
        shapes[f"{name}.bias"] = (width_out,)

    def norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def resnet(name, width_in, width_out):
        norm(f"{name}.norm1", width_in)
        conv(f"{name}.conv1", width_in, width_out)
        norm(f"{name}.norm2", width_out)
        conv(f"{name}.conv2", width_out, width_out)
        if width_in != width_out:
            conv(f"{name}.nin_shortcut", width_in, width_out, 1)

    def middle(name, width):
        resnet(f"{name}.block_1", width, width)
        norm(f"{name}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.attn_1.{part}", width, width, 1)
        resnet(f"{name}.block_2", width, width)

    levels, width = len(widths), base
    conv("encoder.conv_in", 3, base)
    for i in range(levels):
        for j in range(blocks):
            resnet(f"encoder.down.{i}.block.{j}", width, widths[i])
            width = widths[i]
        if i < levels - 1:
            conv(f"encoder.down.{i}.downsample.conv", width, width)
    middle("encoder.mid", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", width, 2 * latents)
    conv("decoder.conv_in", latents, width)
    middle("decoder.mid", width)
    for i in reversed(range(levels)):
        for j in range(blocks + 1):
            resnet(f"decoder.up.{i}.block.{j}", width, widths[i])
            width = widths[i]
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", width, width)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3)
    return shapes
