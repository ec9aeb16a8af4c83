"""The one exception for what a person gave and can put right, and the one check that raises it.

What a value must be is said once, by its type: `Annotated[int, msgspec.Meta(ge=2, le=1000)]`. The same types make JSON
schemas (msgspec) and flags (`command.add_flags`). Python, JSON, TOML and the command line all end here, so that a
wrong value gets the same sentence wherever it was written.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
from msgspec import Meta

T = TypeVar("T")


class InputError(ValueError):
    """Bad input: one sentence that names the thing, its value and what would be right.

    The command line prints it and exits with code 2.
    """


def validated(thing: Any) -> None:
    """Checks every field of a Struct or dataclass; for its `__post_init__`, since neither does so itself.

    Fields are replaced by what `checked` returns, so that a list becomes the tuple that is declared.

    Raises:
        InputError: a field is not what its type says.
    """
    put = msgspec.structs.force_setattr if isinstance(thing, msgspec.Struct) else object.__setattr__
    for name, kind in field_types(type(thing)).items():
        value = getattr(thing, name)
        right = checked(name, value, kind)
        if right is not value:
            put(thing, name, right)


def read(data: Mapping[str, Any], record: type[T], within: str = "") -> T:
    """A Struct or dataclass from what was read from JSON or TOML.

    Args:
        data: its fields by name; tables within it are mappings too.
        record: the class.
        within: the name of the field that the data stands in, for messages.

    Raises:
        InputError: a field is unknown, missing, or not what its type says.
    """
    types = field_types(record)
    dotted = f"{within}." if within else ""
    for name in data:
        if name not in types:
            raise InputError(f"there is no setting {dotted}{name}; there are {', '.join(types)}")
    for name, parameter in inspect.signature(record).parameters.items():
        if name not in data and parameter.default is parameter.empty:
            raise InputError(f"{name} is missing{within and f' in {within}'}; it must be {_described(types[name])}")
    return record(**{name: checked(dotted + name, value, types[name]) for name, value in data.items()})


def checked(name: str, value: Any, kind: Any) -> Any:
    """A value as its type has it: NumPy's numbers as Python's, lists as tuples, mappings as the Struct they are for.

    Args:
        name: what to call it.
        value: the value.
        kind: its type, perhaps `Annotated` with `msgspec.Meta`.

    Raises:
        InputError: it is not what the type says. A bool is no number, a float no whole number, and NaN and infinity
            are no numbers.
    """
    base, metas = apart(kind)
    origin, arguments = get_origin(base), get_args(base)
    if isinstance(value, np.generic):
        value = value.item()
    given = value

    def wrong() -> InputError:
        return InputError(f"{name} is {_shown(given)}; it must be {_described(kind)}")

    if base is Any:
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        options = [option for option in arguments if option is not NoneType]
        if len(options) == 1:
            return checked(name, value, options[0])
        for option in options:
            if _is_record(option) and isinstance(value, Mapping):
                return read(value, option, name)
            try:
                return checked(name, value, option)
            except InputError:
                continue
        raise wrong()
    if origin is Literal:
        for choice in arguments:
            if type(choice) is type(value) and choice == value:
                return choice
        raise wrong()
    if origin is tuple:
        any_length = arguments[-1] is Ellipsis
        least = max((meta.min_length or 0 for meta in metas), default=0) if any_length else len(arguments)
        if not isinstance(value, list | tuple) or len(value) < least or (not any_length and len(value) > least):
            raise wrong()
        if any_length:
            return tuple(checked(f"{name}[{i}]", item, arguments[0]) for i, item in enumerate(value))
        return tuple(checked(name, item, inner) for item, inner in zip(value, arguments, strict=True))
    if _is_record(base) and isinstance(value, Mapping):
        return read(value, base, name)
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:  # hundreds of digits
            raise wrong() from None
    if not isinstance(value, origin or base) or (isinstance(value, bool) and base is not bool):
        raise wrong()
    if not all(_within(value, meta) for meta in metas) or (isinstance(value, float) and not math.isfinite(value)):
        raise wrong()
    return value


def json_object(text: str | bytes, like: str = "") -> dict[str, Any]:
    """The object that JSON holds.

    Args:
        text: the JSON.
        like: an example of what it should be, for messages.

    Raises:
        InputError: it is no JSON, or no object.
    """
    right = f"an object{like and ' such as '}{like}"
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, a number of thousands of digits, or a thousand brackets
        raise InputError(f"{_start(text)} is no JSON ({error}); give {right}") from None
    if not isinstance(data, dict):
        raise InputError(f"{_start(text)} is no object; give {right}")
    return data


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    """`checked` for an argument of a function: a whole number in a range."""
    checked(name, value, Annotated[int, Meta(ge=low, le=high)])


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """`checked` for an argument of a function: one of some choices."""
    checked(name, value, Literal[tuple(choices)])


def apart(kind: Any) -> tuple[Any, tuple[Meta, ...]]:
    """A type without its annotations, and those of them that are msgspec's."""
    if get_origin(kind) is not Annotated:
        return kind, ()
    base, *notes = get_args(kind)
    return base, tuple(note for note in notes if isinstance(note, Meta))


@functools.cache
def field_types(record: type) -> dict[str, Any]:
    """The fields of a Struct or dataclass, with the annotations of their types."""
    if issubclass(record, msgspec.Struct):
        names = record.__struct_fields__
    else:
        names = [field.name for field in dataclasses.fields(record)]
    hints = get_type_hints(record, include_extras=True)
    return {name: hints[name] for name in names}


def _is_record(base: Any) -> bool:
    return isinstance(base, type) and (issubclass(base, msgspec.Struct) or dataclasses.is_dataclass(base))


def _within(value: Any, meta: Meta) -> bool:
    """Whether a value keeps to a constraint; NaN keeps to none."""
    return (
        (meta.ge is None or value >= meta.ge)
        and (meta.gt is None or value > meta.gt)
        and (meta.le is None or value <= meta.le)
        and (meta.lt is None or value < meta.lt)
        and (meta.min_length is None or len(value) >= meta.min_length)
    )


def _shown(value: Any) -> str:
    """A value in a sentence: an array or an image would fill the screen."""
    plain = value is None or isinstance(value, str | bytes | int | float | list | tuple | dict)
    text = repr(value) if plain else f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} and so on"


_LONGEST = 400  # characters of a value in a sentence: in JSON it may be an image


def _start(text: str | bytes, length: int = 80) -> str:
    text = text.strip()
    return repr(text) if len(text) <= length else f"{text[:length]!r} and so on"


def _described(kind: Any) -> str:
    """What a value of a type must be; that it may be left out goes without saying.

    `Meta(extra={"is": …})` says it where the type alone would say it badly.
    """
    base, metas = apart(kind)
    for meta in metas:
        if meta.extra and "is" in meta.extra:
            return meta.extra["is"]
    origin, arguments = get_origin(base), get_args(base)
    if origin in (Union, UnionType):
        options = [option for option in arguments if option is not NoneType]
        return " or ".join(map(_described, options))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        if arguments[-1] is not Ellipsis:
            return f"a list of {len(arguments)}"
        least = max((meta.min_length or 0 for meta in metas), default=0)
        return f"a list of at least {least}" if least else "a list"
    if base is str:
        return "a text that is not empty" if any(meta.min_length for meta in metas) else "a text"
    if base is bool:
        return "true or false"
    if base in (int, float):
        return ", ".join(["a whole number" if base is int else "a number", *_span(metas)])
    if _is_record(base):
        return f"an object with some of {', '.join(field_types(base))}"
    return f"a {(origin or base).__name__}"


def _span(metas: Sequence[Meta]) -> list[str]:
    """The range that constraints leave, in words."""
    low, above, high, below = (
        next((limit for meta in metas if (limit := getattr(meta, name)) is not None), None)
        for name in ("ge", "gt", "le", "lt")
    )
    if low is not None and high is not None:
        return [f"from {low} to {high}"]
    words = {"at least": low, "above": above, "at most": high, "below": below}
    said = [f"{word} {limit}" for word, limit in words.items() if limit is not None]
    return [" and ".join(said)] if said else []
