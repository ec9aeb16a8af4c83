"""A Parquet file of requests: a row each, in columns called as the fields of a line of JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bagel_jax.batch.files import file_fingerprint, open_file
from bagel_jax.batch.places import Place, parent
from bagel_jax.errors import InputError, field_types
from bagel_jax.options import RequestForm

_ROWS = 16  # in memory at once; each may have images in it
_READ_BYTES = 2**20  # of a column at once, instead of a whole row group's


class ParquetRows:
    """A Parquet file of requests. Nulls are not said; a number that is whole is a whole number.

    An image is a path, the bytes of an image's file, or a struct of `bytes` and `path` as of Hugging Face's `Image`;
    in `inputs` it is a struct with such an `image`, and a text is one with `text`, or all are texts.

    Raises:
        InputError: it cannot be read, has no row or a column that no request has, or pyarrow is not installed.
    """

    def __init__(self, path: Place):
        self.name, self.base, self._path = str(path), parent(path), path
        with opened_table(self._path, f"the job {self.name}") as table:
            known = (*field_types(RequestForm), "metadata")
            for column in table.schema_arrow.names:
                if column not in known:
                    raise InputError(f"the job {path} has a column {column}; it may have {', '.join(known)}")
            self._rows = table.metadata.num_rows
            if not self._rows:
                raise InputError(f"the job {path} has no row; it must have one a request")

    def lines(self) -> Iterator[bytes]:
        """All rows, as JSON; images that are in them are `data:` URLs there."""
        with opened_table(self._path, f"the job {self.name}") as table:
            for batch in table.iter_batches(batch_size=_ROWS):
                yield from map(_json, batch.to_pylist(maps_as_pydicts="lossy"))

    def count(self) -> int:
        """How many rows there are."""
        return self._rows

    def fingerprint(self) -> dict[str, Any]:
        """The file's length, its beginning, and its end, where it says of all columns what is in them."""
        return file_fingerprint(self._path)


@contextmanager
def opened_table(path: Place, name: str) -> Iterator[Any]:
    """A Parquet file, pyarrow's `ParquetFile`, of which only what is asked for is in memory.

    Args:
        path: where it is.
        name: what errors call it.

    Raises:
        InputError: it cannot be read, also later, or pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"{name} needs pyarrow, which is not installed; run pip install -e '.[parquet]' in the folder of bagel_jax"
        ) from None
    try:
        with open_file(path) as file:
            yield parquet.ParquetFile(file, buffer_size=_READ_BYTES, pre_buffer=False)  # or all of it is kept
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{name} cannot be read as Parquet ({error}); give a whole file") from None


def _json(row: Mapping[str, Any]) -> bytes:
    said = {}
    for name, value in row.items():
        if name == "image":
            value = _image(value)
        elif name == "images" and value is not None:
            value = [_image(item) for item in value]
        elif name == "inputs" and value is not None:
            value = [_input(item) for item in value]
        elif isinstance(value, float) and value.is_integer():  # pandas makes such of whole numbers beside nulls
            value = int(value)
        if value is not None:
            said[name] = value
    return json.dumps(said, default=str).encode()


def _image(value: Any) -> Any:
    """As JSON has an image: its path, or a `data:` URL with what is in its file."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return f"data:;base64,{base64.b64encode(value).decode()}"
    return value


def _input(value: Any) -> Any:
    """As JSON has one of the inputs: a text, or an object with an image."""
    if not isinstance(value, Mapping):
        return value
    said = {name: item for name, item in value.items() if item is not None}
    if set(said) == {"text"}:
        return said["text"]
    return said | ({"image": _image(said["image"])} if "image" in said else {})
