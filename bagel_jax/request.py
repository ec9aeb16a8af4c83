"""What a person asks for, and what comes back. All validation that needs no model is done here."""

from __future__ import annotations

import base64
import binascii
import io
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Protocol

import msgspec
import numpy as np
from msgspec import Meta
from PIL import ExifTags, Image

from bagel_jax.config import BagelConfig
from bagel_jax.errors import InputError, check_choice, json_object, read, validated
from bagel_jax.options import (
    APPLICABLE,
    DEFAULT_SIZE,
    DEFAULTS,
    MAX_SEED,
    MAX_STEPS,
    MAX_TOKENS,
    MODALITIES,
    NEEDS,
    RENORM_TYPES,
    Modality,
    NoiseSource,
    RequestForm,
    Seed,
    Settings,
    defaults_table,
    request_schema,
    settings_of,
)

__all__ = [
    "APPLICABLE",
    "DEFAULTS",
    "MAX_SEED",
    "MAX_STEPS",
    "MAX_TOKENS",
    "MODALITIES",
    "RENORM_TYPES",
    "ImageFile",
    "NoiseSource",
    "Request",
    "Result",
    "Settings",
    "defaults_table",
    "image_size",
    "open_image",
    "request_schema",
]


class Openable(Protocol):
    """A file that is on no disk of this machine; `str` of it names it."""

    def open(self) -> BinaryIO:
        """To be read from; nothing needs to be closed."""


class ImageBase(Protocol):
    """What paths of images start from, where that is no folder of this machine."""

    def __truediv__(self, path: str) -> Path | Openable: ...


MAX_DATA_BYTES = 50 * 2**20  # of an image in a data: URL, encoded as a file would be


@dataclass(frozen=True)
class ImageFile:
    """An image in a file that is decoded when it is needed, each time, and kept nowhere."""

    path: str | Path | Openable  # or the beginning of a data: URL
    size: tuple[int, int]  # width and height in pixels, as viewers show it
    data: bytes | None = field(default=None, repr=False)  # what a data: URL holds, which is a file's contents

    @classmethod
    def find(cls, path: str | Path | Openable) -> ImageFile:
        """Reads the file's header only; damage behind it shows in `open`.

        Raises:
            InputError: no such file, or not an image that Pillow knows.
        """
        with _reading(path) as file, Image.open(file) as image:
            return cls(path, upright_size(image))

    @classmethod
    def named(cls, name: str, base: Path | ImageBase) -> ImageFile:
        """As an image is named in JSON: by its path, or it stands there itself, in a `data:` URL.

        Args:
            name: the path or the URL.
            base: the folder that paths start from.

        Raises:
            InputError: as in `find`; or a URL of another kind, too long, or no base64.
        """
        scheme = name.partition(":")[0].lower()
        if scheme in ("http", "https"):
            raise InputError(f"image {name} is on the web, where nothing is fetched from; give a path or a data: URL")
        start = name if len(name) < _SHOWN else f"{name[:_SHOWN]}…"
        if scheme != "data":
            if len(name) > _LONGEST_PATH:
                raise InputError(f"image {start} is too long for a path; an image itself is data:image/png;base64,…")
            return cls.find(base / name)
        head, comma, encoded = name.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InputError(f"image {start} is no data: URL with base64; give data:image/png;base64,… or the like")
        if len(encoded) > MAX_DATA_BYTES * 4 // 3 + 4:
            raise InputError(
                f"image {start} holds {len(encoded) * 3 // 4:,} bytes; it must be at most {MAX_DATA_BYTES:,}"
            )
        try:
            data = base64.b64decode(encoded, validate=True)
        except (ValueError, binascii.Error) as error:
            raise InputError(f"image {start} is no base64 ({error}); give data:image/png;base64,…") from None
        with _reading(start), Image.open(io.BytesIO(data)) as image:
            return cls(start, upright_size(image), data)

    def open(self) -> Image.Image:
        """The image, decoded; raises as `open_image`."""
        return open_image(self.path, self.data)


_SHOWN = 40  # characters of a data: URL in messages
_LONGEST_PATH = 4096  # bytes, of the systems that this runs on


@dataclass(frozen=True)
class Request:
    """One thing to do.

    Args:
        modality: one of `MODALITIES`.
        inputs: prompts (str) and images (PIL, or files of them), interleaved in any order, as the model is to see them.
        settings: see `Settings`; `Request.create` fills in the modality's defaults.
        seed: all randomness of the request comes from it; `settings.noise` says which numbers it means.
        think: let the model plan in words first.
        negative_prompt: text for the guidance context that otherwise holds no last prompt.
        image_seeds: seeds of the posterior samples of the input images of an edit, one each; None: `seed` for all.
        init_noise: noise to use instead of the seed's: `vae_0`, `vae_1`, … `[1, C, h, w]`, one an input image of
            an edit, and `latent` `[N, C p²]`.
        request_id: names the request in results; made up if empty.
        notes: sentences for the person who asked, about what was understood from the request.

    Raises:
        InputError: something in it cannot be done, whatever the model.
    """

    modality: Modality
    inputs: tuple[str | Annotated[Image.Image | ImageFile, Meta(extra={"is": "a PIL image"})], ...]
    settings: Settings
    seed: Seed = 0
    think: bool = False
    negative_prompt: str | None = None
    image_seeds: tuple[Seed, ...] | None = None
    init_noise: Mapping[str, np.ndarray] | None = None
    request_id: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "request_id", self.request_id or uuid.uuid4().hex)
        validated(self)
        for text in (*self.inputs, self.negative_prompt):
            if isinstance(text, str) and not _is_unicode(text):
                raise InputError(f"prompt {text!r} is not valid Unicode text; give it in UTF-8")
        images = sum(not isinstance(item, str) for item in self.inputs)
        wants_image = self.modality.startswith("img2")
        if wants_image and not images:
            raise InputError(f"{self.modality} was given no image; it needs one")
        if images and not wants_image:
            other = "img2img" if self.makes_image else "img2text"
            raise InputError(f"{self.modality} was given an image; it takes text only ({other} takes an image)")
        if self.image_seeds is not None and len(self.image_seeds) != images:
            raise InputError(f"image_seeds has {len(self.image_seeds)} seeds for {images} images; give one each")
        if images == len(self.inputs):
            raise InputError(f"{self.modality} was given no prompt; it needs one")

    @classmethod
    def create(
        cls,
        modality: str,
        prompt: str | None = None,
        image: str | Path | Image.Image | ImageFile | Sequence[str | Path | Image.Image | ImageFile] | None = None,
        *,
        inputs: Sequence[str | Image.Image | ImageFile] | None = None,
        seed: int = 0,
        think: bool = False,
        negative_prompt: str | None = None,
        image_seeds: Sequence[int] | None = None,
        init_noise: Mapping[str, np.ndarray] | None = None,
        request_id: str | None = None,
        **settings: Any,
    ) -> Request:
        """A request with its modality's defaults.

        Args:
            modality: one of `MODALITIES`.
            prompt: the text; comes after the images, as in the official app.
            image: an image or several, as files, which are decoded here, or PIL images, or as `ImageFile`.
            inputs: instead of `prompt` and `image`: texts and images (PIL or `ImageFile`) in any order.
            seed, think, negative_prompt, image_seeds, init_noise, request_id: see `Request`.
            **settings: fields of `Settings`; None means the default.

        Raises:
            InputError: an unknown setting, an image that cannot be read, or what `Request` and `Settings` raise.
        """
        check_choice("modality", modality, MODALITIES)
        if inputs is None:
            if image is None:
                image = ()
            elif isinstance(image, str | Path | Image.Image | ImageFile):
                image = (image,)
            inputs = [*(open_image(i) if isinstance(i, str | Path) else i for i in image)]
            inputs += [] if prompt is None else [prompt]
        elif prompt is not None or image is not None:
            raise InputError("inputs was given beside prompt or image; give either inputs or the other two")
        given = {name: value for name, value in settings.items() if value is not None}
        notes = []
        if (old := given.pop("picture_seeds", None)) is not None:  # until version 0.2
            if image_seeds is not None:
                raise InputError("picture_seeds was given beside image_seeds, its name now; give image_seeds alone")
            image_seeds = old
            notes.append("picture_seeds is called image_seeds now; the old name goes with the next version")
        for name in given:
            if name not in Settings.__struct_fields__:
                raise InputError(f"there is no setting {name}; there are {', '.join(Settings.__struct_fields__)}")
        notes += _without_effect(modality, given, think)
        if init_noise is not None and not modality.endswith("img"):
            notes.append(f"init_noise has no effect on {modality}")
        if init_noise is not None and "noise" in given:
            notes.append("noise has no effect beside init_noise")
        if negative_prompt and not modality.endswith("img"):
            notes.append(f"negative_prompt has no effect on {modality}")
        return cls(
            modality=modality,
            inputs=tuple(inputs),
            settings=msgspec.structs.replace(DEFAULTS[modality], **given),
            seed=seed,
            think=think,
            negative_prompt=negative_prompt,
            image_seeds=tuple(image_seeds) if isinstance(image_seeds, Iterable) else image_seeds,
            init_noise=init_noise,
            request_id=request_id or "",
            notes=tuple(notes),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str | bytes, base: Path | ImageBase) -> Request:
        """A request as a person writes it in JSON; `request_schema` says what may be in it.

        Images are looked at, and decoded when they are needed.

        Args:
            data: the JSON, or the object that was in it.
            base: the folder that images' paths start from; an image may stand there as a `data:` URL instead.

        Raises:
            InputError: a field is unknown, missing, of another type or out of range, an image is none, or what
                `create` raises.
        """
        form = read(data if isinstance(data, Mapping) else json_object(data), RequestForm)
        if form.image is not None and form.images is not None:
            raise InputError("image was given beside images; give one of them")
        files = form.images if form.image is None else (form.image,)
        images = None if files is None else [ImageFile.named(name, base) for name in files]
        inputs = None
        if form.inputs is not None:
            inputs = [item if isinstance(item, str) else ImageFile.named(item.image, base) for item in form.inputs]
        return cls.create(
            form.modality,
            form.prompt,
            images,
            inputs=inputs,
            seed=form.seed,
            think=form.think,
            negative_prompt=form.negative_prompt,
            image_seeds=form.image_seeds,
            request_id=form.id,
            **settings_of(form),
        )

    @property
    def makes_image(self) -> bool:
        """Whether an image comes out."""
        return self.modality.endswith("img")

    @property
    def prompt(self) -> str:
        """The texts of the inputs."""
        return "\n".join(item for item in self.inputs if isinstance(item, str))

    def image_size(self, config: BagelConfig) -> tuple[int, int]:
        """Height and width in pixels of the image that a text2img request makes with a model.

        Raises:
            InputError: the model cannot make an image of the requested size.
        """
        return image_size(config, self.settings.height, self.settings.width)

    def applicable_settings(self) -> dict[str, Any]:
        """The settings that have an effect on this request."""
        on = {"think": self.think, "taylorseer": self.settings.taylorseer, "do_sample": True}
        names = [name for name in APPLICABLE[self.modality] if on[NEEDS.get(name, "do_sample")]]
        return {name: getattr(self.settings, name) for name in names}


def image_size(config: BagelConfig, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels of an image that a model makes; None: as large as usual.

    Raises:
        InputError: the model cannot make an image of that size.
    """
    unit, limit = config.token_pixels, config.max_image_size
    size = []
    for name, value in (("height", height), ("width", width)):
        if value is None:
            value = min(DEFAULT_SIZE, limit) // unit * unit
        if value % unit or value > limit:
            raise InputError(f"{name} is {value}; it must be a multiple of {unit} and at most {limit} for this model")
        size.append(value)
    return size[0], size[1]


def _without_effect(modality: str, given: Mapping[str, Any], think: bool) -> list[str]:
    """Notes on the settings that were given in vain."""
    notes, on = [], {"think": think, **given}
    for name in given:
        if name not in APPLICABLE[modality]:
            if modality != "img2img" or name not in ("height", "width"):  # said once the size of the edit is known
                notes.append(f"{name} has no effect on {modality}")
        elif name in NEEDS and not on.get(NEEDS[name]):
            notes.append(f"{name} has no effect without {NEEDS[name]}")
    return notes


@dataclass
class Result:
    """What came of a request: a text, or an image; in think mode an image and the text of the plan."""

    request_id: str
    modality: str
    text: str | None = None
    image: Image.Image | None = None
    latents: np.ndarray | None = None  # [N, C p²] float32, after the last step
    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    time_to_first_token: float | None = None  # seconds from the request's arrival in stage 0, compiling included
    tokens_per_second: float | None = None  # decoded, compiling left out
    decoded_tokens: int = 0
    prefilled_tokens: int = 0  # of its contexts, computed in stage 0
    cached_prefix_tokens: int = 0  # of its contexts, found in the prefix cache
    notes: tuple[str, ...] = ()


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image as viewers show it: its EXIF data may say that it lies on its side."""
    try:
        sideways = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # Pillow's parsers raise whatever they like
        sideways = False
    return image.size[::-1] if sideways else image.size


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def open_image(path: str | Path | Openable, data: bytes | None = None) -> Image.Image:
    """An image from a file, fully decoded.

    Args:
        path: the file.
        data: what would be in it, if it is none; `path` is then a name for messages.

    Raises:
        InputError: no such file, or not an image that Pillow can read.
    """
    with _reading(path) as file:
        image = Image.open(file if data is None else io.BytesIO(data))
        image.load()
        return image


@contextmanager
def _reading(path: str | Path | Openable) -> Iterator[str | Path | BinaryIO]:
    """Raises `InputError` for whatever goes wrong with a file of an image; gives what Pillow is to open."""
    try:
        yield path if isinstance(path, str | Path) else path.open()
    except FileNotFoundError:
        raise InputError(f"image {path} does not exist; give the path of an image file") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"image {path} is too large ({error}); give a smaller one") from None
    except Exception as error:  # Pillow's decoders raise whatever they like
        raise InputError(f"{path} cannot be read as an image ({error}); give a PNG, JPEG or the like") from None
