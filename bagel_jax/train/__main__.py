"""The command line: `python -m bagel_jax.train CONFIG`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bagel_jax.errors import InputError
from bagel_jax.train.config import read_train_config
from bagel_jax.train.packages import check_packages


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    p = argparse.ArgumentParser(
        prog="python -m bagel_jax.train",
        description="Trains a model as a TOML file says, from its latest checkpoint if there is one, and exports it.",
        epilog="The fields of CONFIG stand in bagel_jax/train/config.py; examples in configs/.",
    )
    p.add_argument("config", type=Path, metavar="CONFIG", help="a TOML file")
    p.add_argument("--quiet", action="store_true", help="no progress bars")
    args = p.parse_args(argv)
    try:
        config = read_train_config(args.config)
        check_packages()
        from bagel_jax.train.loop import run  # late: brings jax, and a bad file is found without it
        from bagel_jax.train.result import export_state

        destination = export_state(config, *run(config, args.config, quiet=args.quiet))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the latest checkpoint", file=sys.stderr)
        return 130
    print(f"exported {destination}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
