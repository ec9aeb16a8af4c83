"""The files of a published checkpoint: which tensors they hold, and reading them one slice at a time."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from bagel_jax.checkpoint.table import AUTOENCODER, MAIN
from bagel_jax.errors import InputError

_INDEX = "model.safetensors.index.json"
# The dtypes that can be read.
NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: "F32", "BF16", …
    start: int = 0  # of its values in the file, in bytes

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.size * _BYTES.get(self.dtype, 4)


def read_json(path: Path) -> dict:
    """A json file's object.

    Raises:
        InputError: no such file, or not a json object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; a BAGEL checkpoint needs it") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); a BAGEL checkpoint needs it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid json ({error}); fetch it again") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a json {type(data).__name__}; it must hold an object")
    return data


class CheckpointFiles:
    """The safetensors files of one checkpoint directory. Only headers are read until `reading` is used.

    Raises:
        InputError: a file is missing, damaged or truncated, or a tensor is in two files.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.tensors: dict[str, dict[str, TensorInfo]] = {MAIN: {}, AUTOENCODER: {}}
        self._promised: dict[str, str] = {}  # tensor -> shard, as the index says
        for file in self._main_files():
            self._read_header(MAIN, file)
        self._read_header(AUTOENCODER, directory / "ae.safetensors")
        for name, shard in self._promised.items():
            found = self.tensors[MAIN].get(name)
            if found is not None and found.file != self.directory / shard:
                raise InputError(f"tensor {name} is in {found.file.name}, but {_INDEX} says {shard}")

    def _main_files(self) -> list[Path]:
        single = self.directory / "ema.safetensors"
        if single.exists():
            return [single]
        index = self.directory / _INDEX
        if not index.exists():
            raise InputError(f"{self.directory} holds neither ema.safetensors nor {_INDEX}; it needs one of them")
        weight_map = read_json(index).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(shard, str) for shard in weight_map.values())
        ):
            raise InputError(f"{index} has no usable weight_map; it must map tensor names to names of shard files")
        self._promised = weight_map
        return [self.directory / name for name in sorted(set(weight_map.values()))]

    def _read_header(self, kind: str, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"{path} does not exist; a BAGEL checkpoint needs it")
        try:
            with safe_open(str(path), framework="numpy"):  # which checks the header, and that the file is whole
                infos = _tensor_infos(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a whole safetensors file ({error}); fetch it again") from None
        for name, info in infos.items():
            if (other := self.tensors[kind].setdefault(name, info)) is not info:
                raise InputError(f"tensor {name} is in both {other.file.name} and {path.name}; it may be in one only")

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of one kind (`MAIN` or `AUTOENCODER`)."""
        return {name: info.shape for name, info in self.tensors[kind].items()}

    @contextmanager
    def reading(self) -> Iterator[Callable[[str, str, tuple[slice, ...]], np.ndarray]]:
        """Opens the files for a while: yields `read(kind, name, index)`, one slice of one tensor in the file's dtype.

        What is read is a copy, and the file's pages are let go of at once: mapped pages count as this process's memory.
        """
        maps: dict[Path, mmap.mmap] = {}

        def read(kind: str, name: str, index: tuple[slice, ...]) -> np.ndarray:
            info = self.tensors[kind][name]
            if info.file not in maps:
                with info.file.open("rb") as file:
                    maps[info.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            mapped = maps[info.file]
            whole = np.frombuffer(mapped, NUMPY[info.dtype], info.size, info.start).reshape(info.shape)
            part = whole[index].copy()
            first = info.start - info.start % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, first, info.start + info.num_bytes - first)
            return part

        yield read
        maps.clear()


def _tensor_infos(path: Path) -> dict[str, TensorInfo]:
    """What a file's header says of each tensor, by name."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: TensorInfo(path, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }
