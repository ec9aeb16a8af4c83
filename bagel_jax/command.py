"""What the command lines share: exit codes, errors of one sentence, and flags made from Structs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import msgspec

from bagel_jax.errors import apart

T = TypeVar("T", bound=msgspec.Struct)

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one sentence, without the usage of thirty options before it."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with `BAD_INPUT`."""
        self.exit(BAD_INPUT, f"error: {message}; see --help\n")


def add_flags(groups: Mapping[str, argparse._ActionsContainer], struct: type[msgspec.Struct], *, defaults: bool):
    """Adds a flag for each field of a Struct whose `Meta.extra` names one of the groups.

    The field's name, type, description and default are the flag's. `Meta.extra` may have other spellings (`flags`) and
    what stands for the value in help (`metavar`; None: the choices, which the parser then checks itself). A bool that
    is false is turned on by its flag, one that is true is turned off by `--no-NAME`. Ranges are the Struct's to check.

    Args:
        groups: where flags go, by name.
        struct: the class; `from_flags` makes one of what was parsed.
        defaults: whether flags have the Struct's defaults, which help then shows, or None for what is not given.
    """
    for field in msgspec.structs.fields(struct):
        base, (meta, *_) = apart(field.type)
        extra, flag = meta.extra, field.name.replace("_", "-")
        if extra["group"] not in groups:
            continue
        usual = field.default if defaults else None
        options: dict[str, Any] = {"dest": field.name, "default": usual, "help": meta.description}
        if base is bool:
            names = extra.get("flags") or [f"--no-{flag}" if field.default else f"--{flag}"]
            options["action"] = "store_false" if field.default else "store_true"
            options["help"] = f"do not {meta.description}" if field.default else meta.description
        else:
            names = extra.get("flags") or [f"--{flag}"]
            options |= _value(base, extra.get("metavar"))
            if usual not in (None, ""):
                options["help"] += " (%(default)s)"
        groups[extra["group"]].add_argument(*names, **options)


def from_flags(args: argparse.Namespace, struct: type[T]) -> T:
    """The Struct that flags of `add_flags`, with defaults, are for."""
    return struct(**{name: getattr(args, name) for name in struct.__struct_fields__})


def _value(base: Any, metavar: str | tuple[str, ...] | None) -> dict[str, Any]:
    """What argparse is told of a flag with a value of a type."""
    if get_origin(base) is Literal:
        choices = get_args(base)
        options = {"choices": choices} if metavar is None else {"metavar": metavar}
        return options | {"type": type(choices[0])}
    if get_origin(base) is tuple:
        inner = get_args(base)
        return {"type": apart(inner[0])[0], "nargs": len(inner), "metavar": metavar}
    kinds = [apart(option)[0] for option in get_args(base)] or [base]  # without the None of what may be left out
    return {"type": kinds[0], "metavar": metavar}
