"""What a person asks for, and what comes back. All validation that needs no model is done here.

The defaults stand in `DEFAULTS`, once for every entry point. They are the official `app.py`'s.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bagel_jax.config import BagelConfig
from bagel_jax.errors import InputError, check_choice, check_flag, check_number, check_whole

MODALITIES = ("text2img", "img2img", "img2text", "text2text")
RENORM_TYPES = ("global", "channel", "text_channel")
MAX_STEPS = 1000
MAX_TOKENS = 32768  # as far as the published trunk has positions
_DEFAULT_SIZE = 1024  # pixels
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Settings:
    """How a request is to be answered. Which fields matter depends on the modality: see `DEFAULTS`."""

    height: int | None = None  # pixels; None: 1024, or less where the model's limit is lower
    width: int | None = None  # likewise
    steps: int = 50  # schedule points; one model evaluation fewer
    timestep_shift: float = 3.0
    cfg_text_scale: float = 4.0  # 1 or less: off
    cfg_img_scale: float = 1.5  # 1 or less: off
    cfg_interval: tuple[float, float] = (0.4, 1.0)  # guidance at timesteps lo < t <= hi
    cfg_renorm_type: str = "global"
    cfg_renorm_min: float = 0.0
    taylorseer: bool = False  # forecast the trunk's output at most steps instead of computing it
    taylorseer_interval: int = 3  # every so many steps one is computed
    taylorseer_order: int = 2  # of the expansion; officially 6, which needs more memory and is no closer
    taylorseer_first: int = 5  # so many steps at the beginning are all computed
    max_think_tokens: int = 1024  # decoding steps; `<|im_start|>` is one of them, as in the official code
    max_tokens: int = 512  # likewise
    do_sample: bool = False  # False: greedy
    text_temperature: float = 0.3
    top_k: int = 0  # sample among so many tokens only; 0: all
    top_p: float = 1.0  # sample among the likeliest tokens with this much of the probability

    def __post_init__(self):
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        check_whole("steps", self.steps, 2, MAX_STEPS)
        check_whole("max_think_tokens", self.max_think_tokens, 1, MAX_TOKENS)
        check_whole("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        check_flag("taylorseer", self.taylorseer)
        check_whole("taylorseer_interval", self.taylorseer_interval, 1, MAX_STEPS)
        check_whole("taylorseer_order", self.taylorseer_order, 0, 9)
        check_whole("taylorseer_first", self.taylorseer_first, 1, MAX_STEPS)
        check_number("timestep_shift", self.timestep_shift, 0, above=True)
        check_number("cfg_text_scale", self.cfg_text_scale, 0)
        check_number("cfg_img_scale", self.cfg_img_scale, 0)
        check_number("cfg_renorm_min", self.cfg_renorm_min, 0, 1)
        check_number("text_temperature", self.text_temperature, 0, above=self.do_sample is True)
        check_whole("top_k", self.top_k, 0, 2**31 - 1)
        check_number("top_p", self.top_p, 0, 1, above=True)
        if not isinstance(self.cfg_interval, list | tuple) or len(self.cfg_interval) != 2:
            raise InputError(f"cfg_interval is {self.cfg_interval!r}; it must be two numbers, LO and HI")
        object.__setattr__(self, "cfg_interval", tuple(self.cfg_interval))
        for value in self.cfg_interval:
            check_number("cfg_interval", value, 0, 1)
        if self.cfg_interval[0] > self.cfg_interval[1]:
            raise InputError(f"cfg_interval is {self.cfg_interval}; LO must not be above HI")
        check_choice("cfg_renorm_type", self.cfg_renorm_type, RENORM_TYPES)
        check_flag("do_sample", self.do_sample)


_IMAGE = (
    "steps",
    "timestep_shift",
    "cfg_text_scale",
    "cfg_img_scale",
    "cfg_interval",
    "cfg_renorm_type",
    "cfg_renorm_min",
    "taylorseer",
    "taylorseer_interval",
    "taylorseer_order",
    "taylorseer_first",
)
_SAMPLING = ("do_sample", "text_temperature", "top_k", "top_p")

# Which settings a modality has.
APPLICABLE: Mapping[str, tuple[str, ...]] = {
    "text2img": ("height", "width", *_IMAGE, "max_think_tokens", *_SAMPLING),
    "img2img": (*_IMAGE, "max_think_tokens", *_SAMPLING),
    "img2text": ("max_tokens", *_SAMPLING),
    "text2text": ("max_tokens", *_SAMPLING),
}

# The one table of defaults. Source: official `app.py`; text2img's cfg_img_scale is inherited from `inferencer.py`.
DEFAULTS: Mapping[str, Settings] = {
    "text2img": Settings(),
    "img2img": Settings(cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel"),
    "img2text": Settings(),
    "text2text": Settings(),
}


def defaults_table() -> str:
    """`DEFAULTS` as text, one row a setting, one column a modality; a dash where the setting does not apply."""
    rows = [["", *MODALITIES]]
    for name in (f.name for f in dataclasses.fields(Settings)):
        cells = [
            _show(getattr(DEFAULTS[modality], name)) if name in APPLICABLE[modality] else "-" for modality in MODALITIES
        ]
        rows.append(["--" + name.replace("_", "-"), *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _show(value) -> str:
    if value is None:
        return str(_DEFAULT_SIZE)
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Request:
    """One thing to do.

    Args:
        modality: one of `MODALITIES`.
        inputs: prompts (str) and images (PIL), interleaved in any order, as the model is to see them.
        settings: see `Settings`; `Request.create` fills in the modality's defaults.
        seed: all randomness of the request comes from it.
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

    modality: str
    inputs: tuple[str | Image.Image, ...]
    settings: Settings
    seed: int = 0
    think: bool = False
    negative_prompt: str | None = None
    image_seeds: tuple[int, ...] | None = None
    init_noise: Mapping[str, np.ndarray] | None = None
    request_id: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "request_id", self.request_id or uuid.uuid4().hex)
        check_choice("modality", self.modality, MODALITIES)
        check_whole("seed", self.seed, 0, MAX_SEED)
        check_flag("think", self.think)
        if not isinstance(self.negative_prompt, str | None):
            raise InputError(f"negative_prompt is {self.negative_prompt!r}; it must be a string or None")
        for item in self.inputs:
            if not isinstance(item, str | Image.Image):
                raise InputError(f"an input is a {type(item).__name__}; each must be a string or a PIL image")
        for text in (*self.inputs, self.negative_prompt):
            if isinstance(text, str) and not _is_unicode(text):
                raise InputError(f"prompt {text!r} is not valid Unicode text; give it in UTF-8")
        images = sum(isinstance(item, Image.Image) for item in self.inputs)
        wants_image = self.modality.startswith("img2")
        if wants_image and not images:
            raise InputError(f"{self.modality} was given no image; it needs one")
        if images and not wants_image:
            other = "img2img" if self.makes_image else "img2text"
            raise InputError(f"{self.modality} was given an image; it takes text only ({other} takes an image)")
        if self.image_seeds is not None:
            for value in self.image_seeds:
                check_whole("image_seeds", value, 0, MAX_SEED)
            if len(self.image_seeds) != images:
                raise InputError(f"image_seeds has {len(self.image_seeds)} seeds for {images} images; give one each")
        if images == len(self.inputs):
            raise InputError(f"{self.modality} was given no prompt; it needs one")

    @classmethod
    def create(
        cls,
        modality: str,
        prompt: str | None = None,
        image: str | Path | Image.Image | Sequence[str | Path | Image.Image] | None = None,
        *,
        inputs: Sequence[str | Image.Image] | None = None,
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
            image: an image or several, as files or PIL images.
            inputs: instead of `prompt` and `image`: texts and PIL images in any order.
            seed, think, negative_prompt, image_seeds, init_noise, request_id: see `Request`.
            **settings: fields of `Settings`; None means the default.

        Raises:
            InputError: an unknown setting, an image that cannot be read, or what `Request` and `Settings` raise.
        """
        check_choice("modality", modality, MODALITIES)
        if inputs is None:
            if image is None:
                image = ()
            elif isinstance(image, str | Path | Image.Image):
                image = (image,)
            inputs = [*(i if isinstance(i, Image.Image) else open_image(i) for i in image)]
            inputs += [] if prompt is None else [prompt]
        elif prompt is not None or image is not None:
            raise InputError("inputs was given beside prompt or image; give either inputs or the other two")
        given = {name: value for name, value in settings.items() if value is not None}
        known = [f.name for f in dataclasses.fields(Settings)]
        for name in given:
            if name not in known:
                raise InputError(f"there is no setting {name}; there are {', '.join(known)}")
        idle = [name for name in given if name not in APPLICABLE[modality]]
        if modality == "img2img":  # said of a size once the size of the edit is known
            idle = [name for name in idle if name not in ("height", "width")]
        notes = [f"{name} has no effect on {modality}" for name in idle]
        if "max_think_tokens" in given and "max_think_tokens" not in idle and not think:
            notes.append("max_think_tokens has no effect without think")
        if not given.get("do_sample"):
            notes += [f"{name} has no effect without do_sample" for name in _SAMPLING[1:] if name in given]
        if not given.get("taylorseer"):
            names = [name for name in given if name.startswith("taylorseer_") and name not in idle]
            notes += [f"{name} has no effect without taylorseer" for name in names]
        if init_noise is not None and not modality.endswith("img"):
            notes.append(f"init_noise has no effect on {modality}")
        if negative_prompt and not modality.endswith("img"):
            notes.append(f"negative_prompt has no effect on {modality}")
        return cls(
            modality=modality,
            inputs=tuple(inputs),
            settings=dataclasses.replace(DEFAULTS[modality], **given),
            seed=seed,
            think=think,
            negative_prompt=negative_prompt,
            image_seeds=None if image_seeds is None else tuple(image_seeds),
            init_noise=init_noise,
            request_id=request_id or "",
            notes=tuple(notes),
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
        unit, limit = config.token_pixels, config.max_image_size
        size = []
        for name in ("height", "width"):
            value = getattr(self.settings, name)
            if value is None:
                value = min(_DEFAULT_SIZE, limit) // unit * unit
            if value % unit or value > limit:
                raise InputError(
                    f"{name} is {value}; it must be a multiple of {unit} and at most {limit} for this model"
                )
            size.append(value)
        return size[0], size[1]

    def applicable_settings(self) -> dict[str, Any]:
        """The settings that have an effect on this request."""
        names = [n for n in APPLICABLE[self.modality] if n != "max_think_tokens" or self.think]
        names = [n for n in names if not n.startswith("taylorseer_") or self.settings.taylorseer]
        return {name: getattr(self.settings, name) for name in names}


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
    prefilled_tokens: int = 0  # of its contexts, computed in stage 0
    cached_prefix_tokens: int = 0  # of its contexts, found in the prefix cache
    notes: tuple[str, ...] = ()


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def open_image(path: str | Path) -> Image.Image:
    """An image from a file, fully decoded.

    Raises:
        InputError: no such file, or not an image that Pillow can read.
    """
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise InputError(f"image {path} does not exist; give the path of an image file") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"image {path} is too large ({error}); give a smaller one") from None
    except Exception as error:  # Pillow's decoders raise whatever they like
        raise InputError(f"{path} cannot be read as an image ({error}); give a PNG, JPEG or the like") from None
    return image
