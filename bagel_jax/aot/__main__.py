"""The command line: `python -m bagel_jax.aot kernels --target v5e`, `python -m bagel_jax.aot model --target v6e-8`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bagel_jax.aot import kernels, model
from bagel_jax.aot.targets import SLICES, TARGETS
from bagel_jax.command import BAD_INPUT, INTERRUPTED, Parser
from bagel_jax.devices import MeshShape
from bagel_jax.errors import InputError, check_choice


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    p = Parser(prog="python -m bagel_jax.aot", description="Compiles for chips that this machine does not have.")
    commands = p.add_subparsers(dest="command", required=True)
    one = commands.add_parser("kernels", help="all kernels at the sizes of the published model")
    one.add_argument("--target", required=True, metavar="{" + ",".join(TARGETS) + "}", help="the chip")
    whole = commands.add_parser("model", help="all programs of the published model, at full size")
    whole.add_argument("--target", required=True, metavar="{" + ",".join(SLICES) + "}", help="the devices")
    whole.add_argument("--mesh", metavar="MESH", help="data=2,tensor=4 (default: what the engine would choose)")
    whole.add_argument("--dtype", default="bfloat16", metavar="{bfloat16,float32}", help="(%(default)s)")
    whole.add_argument("--size", type=int, default=1024, metavar="PIXELS", help="side of large images (%(default)s)")
    whole.add_argument("--only", default="", metavar="TEXT", help="only programs that have TEXT in their names")
    args = p.parse_args(argv)
    try:
        if args.command == "kernels":
            check_choice("--target", args.target, tuple(TARGETS))
            return kernels.kernels(args.target)
        check_choice("--target", args.target, tuple(SLICES))
        check_choice("--dtype", args.dtype, ("bfloat16", "float32"))
        mesh = None if args.mesh is None else MeshShape.parse("--mesh", args.mesh)
        return model.model(model.Asked(args.target, mesh, args.dtype, args.size), args.only)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
