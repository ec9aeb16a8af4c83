"""BAGEL-7B-MoT in JAX: text and images in, text and images out.

from bagel_jax import Bagel
model = Bagel.load("models/BAGEL-7B-MoT")
model.generate("text2img", "a red bench below a blue clock").image.save("bench.png")
"""

from bagel_jax.errors import InputError
from bagel_jax.request import DEFAULTS, MODALITIES, Request, Result, Settings

__all__ = ["DEFAULTS", "MODALITIES", "Bagel", "InputError", "Request", "Result", "Settings"]


def __getattr__(name: str):
    # Bagel brings jax along, which takes seconds to import; a command line with a wrong flag should not wait for it.
    if name == "Bagel":
        from bagel_jax.bagel import Bagel

        return Bagel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
