"""What is imported when, and from which packages."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from commands import process

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bagel_jax"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {"train": ("train",), "batch": ("gcs", "parquet", "s3")}  # of rooms
SERVING = [*PROJECT["dependencies"], "jaxlib"]  # which jax installs in its own version


def declared(requirements: list[str]) -> set[str]:
    """Names of distributions, as PyPI compares them."""
    return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", text)[0]).lower() for text in requirements}


def imported(file: Path) -> set[str]:
    """Top-level names of all modules that a file imports, wherever in it, but for Python's own and ours."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"bagel_jax"}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_what_is_imported_is_declared(file):
    """A fresh installation lacks a package that came along with another until now."""
    may = declared(SERVING)
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for extra in EXTRAS.get(room, ()):
        may |= declared(PROJECT["optional-dependencies"][extra])
    providers = packages_distributions()
    for name in imported(file):
        assert declared(providers[name]) & may, f"{name} is imported; pyproject.toml declares no package that has it"


@pytest.mark.parametrize("code", ["import bagel_jax.bagel, bagel_jax.run", "from bagel_jax import Bagel"])
def test_serving_imports_nothing_of_training(code):
    """Every answer of the command line waits seconds for packages that it does not use."""
    unused = "absl.app", "grain", "tensorboardX", "orbax", "transformers", "jax.experimental.mosaic.gpu"
    # Not optax: flax.nnx imports it by itself.
    done = process("-c", f"{code}\nimport sys; print([name for name in {unused} if name in sys.modules])")
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
