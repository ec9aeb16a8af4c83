"""A folder of images: each of them with each of some prompts is a request."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bagel_jax.errors import InputError

SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_MODALITIES = "img2img", "img2text"


class ImageFolder:
    """All images of a folder and the folders in it, by name; hidden ones and links to folders are left out.

    Args:
        path: the folder.
        modality: `img2img` or `img2text`.
        prompts: each image gets all of them.

    Raises:
        InputError: no image, no prompt, or another modality.
    """

    def __init__(self, path: Path, modality: str | None, prompts: Sequence[str] | None):
        self.name, self.base, self._modality, self._prompts = str(path), path, modality, prompts
        self._count: int | None = None
        if not prompts:
            raise InputError(f"the job {path} is a folder and there are no --prompts; say what to do with its images")
        if modality not in _MODALITIES:
            raise InputError(f"--modality is {modality}; it must be {' or '.join(_MODALITIES)} for a folder of images")
        if next(self._images(), None) is None:
            raise InputError(f"the job {path} has no image in it; it must have some ({', '.join(sorted(SUFFIXES))})")

    def lines(self) -> Iterator[bytes]:
        """A request an image and prompt; the image's path is its metadata."""
        for image in self._images():
            path = image.relative_to(self.base)
            name = re.sub(r"[^\w-]+", "_", "-".join(path.with_suffix("").parts))
            for k, prompt in enumerate(self._prompts):
                end = f"-{k}" if len(self._prompts) > 1 else ""
                said = {"modality": self._modality, "prompt": prompt, "image": str(path), "id": name + end}
                yield json.dumps(said | {"metadata": {"image": path.as_posix()}}).encode()

    def count(self) -> int | None:
        """How many lines there are, once a fingerprint was taken."""
        return self._count

    def fingerprint(self) -> dict[str, Any]:
        """The names and sizes of all images, and the prompts."""
        digest, images = hashlib.sha256(), 0
        for image in self._images():
            digest.update(b"%d %s\n" % (image.stat().st_size, os.fsencode(image.relative_to(self.base))))
            images += 1
        self._count = images * len(self._prompts)
        return {"images": images, "sha256": digest.hexdigest(), "prompts": list(self._prompts)}

    def _images(self) -> Iterator[Path]:
        return _images_in(self.base)


def _images_in(folder: Path) -> Iterator[Path]:
    """In order of their names, folder by folder: the names of one folder are in memory."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read ({error.strerror}); give one that can") from None
    for entry in found:
        if entry.name.startswith("."):
            continue
        path = folder / entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _images_in(path)
        elif path.suffix.lower() in SUFFIXES and entry.is_file():
            yield path
