"""The files of a published checkpoint: which tensors they hold, and reading them one slice at a time."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from bagel_jax.checkpoint.table import AUTOENCODER, MAIN
from bagel_jax.errors import InputError

_INDEX = "model.safetensors.index.json"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: "F32", "BF16", …

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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid json ({error})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a json {type(data).__name__}; it must hold an object")
    return data


class CheckpointFiles:
    """The safetensors files of one checkpoint directory. Only headers are read until `read` is called.

    Raises:
        InputError: a file is missing, damaged or truncated, or a tensor is in two files.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.tensors: dict[str, dict[str, TensorInfo]] = {MAIN: {}, AUTOENCODER: {}}
        self._handles = contextlib.ExitStack()
        self._open: dict[Path, object] = {}
        self._promised: dict[str, str] = {}  # tensor -> shard, as the index says
        for file in self._main_files():
            self._read_header(MAIN, file)
        self._read_header(AUTOENCODER, directory / "ae.safetensors")
        for name, shard in self._promised.items():
            found = self.tensors[MAIN].get(name)
            if found is not None and found.file.name != shard:
                raise InputError(f"tensor {name} is in {found.file.name}, but {_INDEX} says {shard}")

    def _main_files(self) -> list[Path]:
        single = self.directory / "ema.safetensors"
        if single.exists():
            return [single]
        index = self.directory / _INDEX
        if not index.exists():
            raise InputError(f"{self.directory} holds neither ema.safetensors nor {_INDEX}; it needs one of them")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index} has no weight_map; it must map tensor names to shard files")
        self._promised = weight_map
        return [self.directory / name for name in sorted(set(weight_map.values()))]

    def _read_header(self, kind: str, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"{path} does not exist; a BAGEL checkpoint needs it")
        try:
            handle = self._handles.enter_context(safe_open(str(path), framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a whole safetensors file ({error}); fetch it again") from None
        self._open[path] = handle
        for name in handle.keys():  # noqa: SIM118 (a safetensors handle, not a dict)
            view = handle.get_slice(name)
            info = TensorInfo(path, tuple(view.get_shape()), view.get_dtype())
            if (other := self.tensors[kind].setdefault(name, info)) is not info:
                raise InputError(f"tensor {name} is in both {other.file.name} and {path.name}; it may be in one only")

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of one kind (`MAIN` or `AUTOENCODER`)."""
        return {name: info.shape for name, info in self.tensors[kind].items()}

    def read(self, kind: str, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """One slice of one tensor, in the file's dtype."""
        return self._open[self.tensors[kind][name].file].get_slice(name)[index]

    def __enter__(self) -> CheckpointFiles:
        return self

    def __exit__(self, *exc) -> None:
        self._handles.close()
