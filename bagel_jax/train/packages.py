"""The packages that only training needs, which the extra `train` installs."""

from __future__ import annotations

from importlib.util import find_spec

from bagel_jax.errors import InputError

_NEEDED = ("absl", "grain", "tensorboardX")


def check_packages() -> None:
    """Raises `InputError`, which says what to install, unless all are there."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(
            f"training needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; run "
            "pip install -e '.[train]' in the folder of bagel_jax"
        )
