"""What can be set in a request: each setting once, with its range, its defaults, and what it has an effect on.

Checks, flags, the table of `--help`, and the forms in which requests stand in files are made from `Settings`. The
defaults are the official `app.py`'s; text2img's cfg_img_scale is inherited from `inferencer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta

from bagel_jax.errors import InputError, apart, field_types, validated

T = TypeVar("T")

Modality = Literal["text2img", "img2img", "img2text", "text2text"]
MODALITIES = get_args(Modality)
RenormType = Literal["global", "channel", "text_channel"]
RENORM_TYPES = get_args(RenormType)
NoiseSource = Literal["official", "numpy"]
MAX_STEPS = 1000
MAX_TOKENS = 32768  # as far as the published trunk has positions
MAX_SEED = 2**32 - 1
Seed = Annotated[int, Meta(ge=0, le=MAX_SEED, description="all randomness of the request comes from it")]
DEFAULT_SIZE = 1024  # pixels


def _setting(
    group: str, on: tuple[str, ...], metavar: str | None, description: str, *, needs: str | None = None, **more: Any
) -> Meta:
    """What is to be said of a setting beside its type and default.

    Args:
        group: of flags in help.
        on: modalities that it has an effect on.
        metavar: what stands for the value in help.
        description: one line.
        needs: what must be on for the setting to have an effect.
        **more: constraints, `says` (see `errors`: what is right, in words), and defaults of single modalities.
    """
    extra = {"group": group, "on": on, "metavar": metavar, "needs": needs}
    extra["defaults"] = {name: more.pop(name) for name in MODALITIES if name in more}
    if "says" in more:
        extra["is"] = more.pop("says")
    return Meta(description=description, extra=extra, **more)


_size = partial(_setting, "images", ("text2img",))
_image = partial(_setting, "images", ("text2img", "img2img"))
_forecast = partial(_image, needs="taylorseer")
_text = partial(_setting, "text", MODALITIES)
_sampling = partial(_text, needs="do_sample")
_answer = partial(_setting, "text", ("img2text", "text2text"))
_plan = partial(_setting, "text", ("text2img", "img2img"), needs="think")

Share = Annotated[float, Meta(ge=0, le=1)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a request is to be answered. Which fields matter depends on the modality: see `DEFAULTS`.

    Raises:
        InputError: a value out of range.
    """

    # None: 1024, or less where the model's limit is lower.
    height: Annotated[Annotated[int, Meta(ge=1)] | None, _size("H", "pixels; text2img")] = None
    width: Annotated[Annotated[int, Meta(ge=1)] | None, _size("W", "pixels; text2img")] = None
    steps: Annotated[int, _image("N", "schedule points; N - 1 evaluations of the model", ge=2, le=MAX_STEPS)] = 50
    timestep_shift: Annotated[float, _image("X", "above 1: more steps near the noise", gt=0)] = 3.0
    cfg_text_scale: Annotated[float, _image("X", "guidance towards the text; 1 is off", ge=0)] = 4.0
    cfg_img_scale: Annotated[float, _image("X", "guidance towards the images; 1 is off", ge=0, img2img=2.0)] = 1.5
    cfg_interval: Annotated[
        tuple[Share, Share],
        _image(
            ("LO", "HI"),
            "timesteps with guidance, LO < t <= HI",
            says="two numbers, LO and HI",
            img2img=(0.0, 1.0),
        ),
    ] = (0.4, 1.0)
    cfg_renorm_type: Annotated[
        RenormType,
        _image("{global,channel,text_channel}", "over what guidance is scaled back", img2img="text_channel"),
    ] = "global"
    cfg_renorm_min: Annotated[float, _image("X", "least factor of the renormalisation", ge=0, le=1)] = 0.0
    noise: Annotated[
        NoiseSource,
        _image("{official,numpy}", "official: a seed draws as in the official app; numpy: from streams of our own"),
    ] = "official"
    taylorseer: Annotated[bool, _image(None, "forecast most steps instead of computing them: faster, other images")] = (
        False
    )
    taylorseer_interval: Annotated[int, _forecast("N", "every N steps one is computed", ge=1, le=MAX_STEPS)] = 3
    # Officially 6, which needs more memory and is no closer.
    taylorseer_order: Annotated[int, _forecast("M", "order of the forecast", ge=0, le=9)] = 2
    taylorseer_first: Annotated[
        int, _forecast("N", "steps at the beginning that are all computed", ge=1, le=MAX_STEPS)
    ] = 5
    # Decoding steps, of which `<|im_start|>` is one, as in the official code; the same in max_tokens.
    max_think_tokens: Annotated[int, _plan("N", "limit of the plan before an image", ge=1, le=MAX_TOKENS)] = 1024
    max_tokens: Annotated[int, _answer("N", "limit of an answer, its thinking included", ge=1, le=MAX_TOKENS)] = 512
    do_sample: Annotated[bool, _text(None, "sample, instead of the likeliest token each time")] = False
    text_temperature: Annotated[float, _sampling("X", "temperature of sampling", ge=0)] = 0.3
    top_k: Annotated[int, _sampling("K", "sample among the K likeliest tokens only; 0: all", ge=0, le=2**31 - 1)] = 0
    top_p: Annotated[float, _sampling("P", "sample among the likeliest that make up P of the chances", gt=0, le=1)] = (
        1.0
    )

    def __post_init__(self):
        validated(self)
        if self.do_sample and self.text_temperature == 0:
            raise InputError("text_temperature is 0; it must be a number, above 0, with do_sample")
        if self.cfg_interval[0] > self.cfg_interval[1]:
            raise InputError(f"cfg_interval is {self.cfg_interval}; LO must not be above HI")


_NOTES: Mapping[str, Mapping[str, Any]] = {
    name: apart(kind)[1][0].extra for name, kind in field_types(Settings).items()
}

# Which settings a modality has.
APPLICABLE: Mapping[str, tuple[str, ...]] = {
    modality: tuple(name for name, notes in _NOTES.items() if modality in notes["on"]) for modality in MODALITIES
}
# What must be on for a setting to have an effect: another setting, or `think`.
NEEDS: Mapping[str, str] = {name: notes["needs"] for name, notes in _NOTES.items() if notes["needs"]}
# The one table of defaults.
DEFAULTS: Mapping[str, Settings] = {
    modality: Settings(
        **{name: notes["defaults"][modality] for name, notes in _NOTES.items() if modality in notes["defaults"]}
    )
    for modality in MODALITIES
}


def defaults_table() -> str:
    """`DEFAULTS` as text, one row a setting, one column a modality; a dash where the setting does not apply."""
    rows = [["", *MODALITIES]]
    for name in Settings.__struct_fields__:
        cells = [default_of(name, modality) if name in APPLICABLE[modality] else "-" for modality in MODALITIES]
        rows.append(["--" + name.replace("_", "-"), *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def default_of(name: str, modality: str) -> str:
    """The default of a setting as a person would type it."""
    value = getattr(DEFAULTS[modality], name)
    if value is None:
        return str(DEFAULT_SIZE)
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def with_settings(form: type[T]) -> type[T]:
    """A Struct like `form` with every setting as one more field, which is None where the default is meant."""
    fields = []
    for name, kind in field_types(Settings).items():
        base, (said, *_) = apart(kind)
        if NoneType in get_args(base):
            fields.append((name, kind, None))
            continue
        limits = Meta(ge=said.ge, gt=said.gt, le=said.le, lt=said.lt, extra=said.extra)  # which a union may not have
        fields.append((name, Annotated[Annotated[base, limits] | None, Meta(description=said.description)], None))
    return msgspec.defstruct(
        form.__name__.strip("_"),
        fields,
        bases=(form,),
        module=form.__module__,
        namespace={"__doc__": form.__doc__},
        frozen=True,
        kw_only=True,
        forbid_unknown_fields=True,
    )


def settings_of(form: Any) -> dict[str, Any]:
    """The settings that were given in a form of `with_settings`."""
    values = {name: getattr(form, name) for name in Settings.__struct_fields__}
    return {name: value for name, value in values.items() if value is not None}


class ImagePath(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image among the inputs."""

    image: Annotated[str, Meta(description="path of an image file, or a data: URL")]


class _RequestForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request to a BAGEL model."""

    modality: Annotated[Modality, Meta(description="what goes in and what comes out")]
    prompt: Annotated[str | None, Meta(description="the text; comes after the images")] = None
    image: Annotated[str | None, Meta(description="path of an image file, or a data: URL")] = None
    images: Annotated[tuple[str, ...] | None, Meta(description="instead: paths of several")] = None
    inputs: Annotated[
        tuple[str | ImagePath, ...] | None,
        Meta(description="instead of prompt and images: texts and images in any order"),
    ] = None
    seed: Seed = 0
    image_seeds: Annotated[
        tuple[Seed, ...] | None,
        Meta(description="seeds of the posterior samples of an edit's images, one each; default: seed for all"),
    ] = None
    think: Annotated[bool, Meta(description="let the model plan in words first")] = False
    negative_prompt: Annotated[str | None, Meta(description="what guidance leads away from")] = None
    id: Annotated[str | None, Meta(description="names the request in results; made up if left out")] = None


# A request as a person writes it in JSON.
RequestForm = with_settings(_RequestForm)


def request_schema() -> dict[str, Any]:
    """The JSON schema of what `Request.from_json` reads."""
    schema = msgspec.json.schema(RequestForm)
    fields = schema["$defs"][RequestForm.__name__]["properties"]
    for name in Settings.__struct_fields__:  # the default is each modality's, not null
        fields[name].pop("default")
        defaults = {modality: default_of(name, modality) for modality in MODALITIES if name in APPLICABLE[modality]}
        alike = len(set(defaults.values())) == 1
        said = next(iter(defaults.values())) if alike else ", ".join(f"{v} in {m}" for m, v in defaults.items())
        fields[name]["description"] += f"; default: {said}"
    return schema
