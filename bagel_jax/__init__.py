"""BAGEL-7B-MoT in JAX: text and images in, text and images out.

from bagel_jax import Bagel
model = Bagel.load("models/BAGEL-7B-MoT")
model.generate("text2img", "a red bench below a blue clock").image.save("bench.png")
"""

import importlib

from bagel_jax.errors import InputError
from bagel_jax.request import DEFAULTS, MODALITIES, Request, Result, Settings
from bagel_jax.settings import EngineConfig

__all__ = [
    "DEFAULTS",
    "MODALITIES",
    "Bagel",
    "EngineConfig",
    "InputError",
    "Request",
    "Result",
    "Settings",
    "functional",
]

__version__ = "0.1.0"  # the package's too: pyproject.toml reads it here


def __getattr__(name: str):
    # These bring jax along, which takes seconds to import; a command line with a wrong flag should not wait for it.
    if name == "Bagel":
        from bagel_jax.bagel import Bagel

        return Bagel
    if name == "functional":
        return importlib.import_module("bagel_jax.functional")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
