"""A conversation: images are drawn, edited and asked about, turn after turn, over one growing context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image

from bagel_jax.request import Request, Result


class Session:
    """Turns that each see all turns before them.

    What a turn brings, prompts, given images, produced images and answers, becomes part of the context of those
    that follow: an image as its VAE and ViT blocks where the turn makes an image, as its ViT block where it makes a
    text. Contexts are found again in the prefix cache, so that a turn computes what is new.

    Args:
        run: answers a request.
        seed: turn i has the seed `seed` + i. The posterior sample of an image keeps the seed of the turn that brought
            it.
    """

    def __init__(self, run: Callable[[Request], Result], *, seed: int = 0):
        self._run, self._seed, self._turn = run, seed, 0
        self.requests: list[Request] = []  # of the turns so far
        self.history: list[str | Image.Image] = []
        self._image_seeds: list[int] = []

    def add(self, image: Image.Image) -> None:
        """Puts an image into the context, of which the next turns know."""
        self.history.append(image)
        self._image_seeds.append(self._seed + self._turn)

    def draw(self, prompt: str, **options: Any) -> Result:
        """A new image, or an edit where there is one; it joins the context, and in think mode the plan before it.

        Args:
            prompt: what to draw or change.
            **options: as in `Request.create`.

        Raises:
            InputError: the turn cannot be done; the session is as before.
        """
        result = self._take("img", prompt, options)
        if result.text is not None:
            self.history.append(result.text)
        self.add(result.image)
        self._turn += 1
        return result

    def ask(self, prompt: str, **options: Any) -> Result:
        """An answer in words; it joins the context.

        Args:
            prompt: the question.
            **options: as in `Request.create`.

        Raises:
            InputError: the turn cannot be done; the session is as before.
        """
        result = self._take("text", prompt, options)
        self.history.append(result.text)
        self._turn += 1
        return result

    def _take(self, makes: str, prompt: str, options: dict[str, Any]) -> Result:
        source = "img" if self._image_seeds else "text"
        inputs = [*self.history, prompt]
        seeds = self._image_seeds if makes == "img" else None
        options = {"seed": self._seed + self._turn} | options
        request = Request.create(f"{source}2{makes}", inputs=inputs, image_seeds=seeds, **options)
        result = self._run(request)
        self.requests.append(request)
        self.history.append(prompt)
        return result
