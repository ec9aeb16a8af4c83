"""A model's sizes, from its json files and, where those are silent or wrong, from its tensors' shapes.

Known to be silent: the autoencoder's widths stand nowhere. Known to be wrong: `max_latent_size` in config.json (32;
the table has 64x64 rows), and `num_hidden_layers` in vit_config.json, which counts one layer more than there is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from bagel_jax.checkpoint.files import CheckpointFiles, read_json
from bagel_jax.checkpoint.table import AUTOENCODER, MAIN
from bagel_jax.config import AutoencoderConfig, BagelConfig, TrunkConfig, VitConfig
from bagel_jax.errors import InputError
from bagel_jax.models.autoencoder import NORM_GROUPS
from bagel_jax.models.layers import ACTIVATIONS

_KINDS = {int: "whole number", float: "number", str: "string", bool: "true or false", dict: "json object"}

Shapes = Mapping[str, tuple[int, ...]]

# The official `load_ae` states these in code.
_SCALE_FACTOR, _SHIFT_FACTOR = 0.3611, 0.1159


def read_config(files: CheckpointFiles) -> BagelConfig:
    """The sizes of the model in a checkpoint directory.

    Raises:
        InputError: a json file or one of its fields is missing or makes no sense, or a tensor that tells a size is
            missing.
    """
    directory = files.directory
    top = read_json(directory / "config.json") if (directory / "config.json").exists() else {}
    llm = _Json(_part(directory, top, "llm_config"), directory / "llm_config.json")
    vit = _Json(_part(directory, top, "vit_config"), directory / "vit_config.json")
    top = _Json(top, directory / "config.json")
    main = files.shapes(MAIN)
    autoencoder = _autoencoder(files.shapes(AUTOENCODER), _Json(top.get("vae_config", dict, {}), top.path))
    latent_dim = _shape(main, "vae2llm.weight", 2)[1]
    vit_config = _vit(vit, main)
    side = _root(_shape(main, "vit_pos_embed.pos_embed", 2)[0], "vit_pos_embed.pos_embed")
    if vit_config.num_positions < side**2:
        raise InputError(
            f"the ViT's own position table has {vit_config.num_positions} rows, but vit_pos_embed.pos_embed {side**2}; "
            "it must have at least as many"
        )
    return BagelConfig(
        trunk=_trunk(llm, main),
        vit=vit_config,
        autoencoder=autoencoder,
        latent_patch_size=_root(latent_dim // autoencoder.latent_channels, "vae2llm.weight"),
        max_latent_size=_root(_shape(main, "latent_pos_embed.pos_embed", 2)[0], "latent_pos_embed.pos_embed"),
        max_vit_patches=side,
        connector_activation=_activation(top, "connector_act", "gelu_pytorch_tanh"),
        time_frequencies=_shape(main, "time_embedder.mlp.0.weight", 2)[1],
        interpolate_positions=top.get("interpolate_pos", bool, False),
    )


class _Json:
    """Fields of a json object, checked as they are read. A default may be a function, called where it is needed."""

    def __init__(self, data: dict, path: Path):
        self.data, self.path = data, path

    def get(self, name: str, kind: type, default=None, *, signed: bool = False):
        value = self.data.get(name)
        if value is None:  # null is how Hugging Face's configs say "the default"
            value = default() if callable(default) else default
        if value is None:
            raise InputError(f"{self.path} has no {name}; it must be given")
        good = isinstance(value, kind)
        if kind in (int, float):
            good = isinstance(value, int | kind) and not isinstance(value, bool) and math.isfinite(value)
            good = good and (value > 0 or signed)
        if not good:
            sign = "positive " if kind in (int, float) and not signed else ""
            raise InputError(f"{self.path} has {name} = {value!r}; it must be a {sign}{_KINDS[kind]}")
        return kind(value)


def _part(directory: Path, top: dict, name: str) -> dict:
    """A json file of its own or, without one, the object of that name in config.json."""
    path = directory / f"{name}.json"
    if not path.exists() and isinstance(top.get(name), dict):
        return top[name]
    return read_json(path)


def _activation(data: _Json, name: str, default: str) -> str:
    value = data.get(name, str, default)
    if value not in ACTIVATIONS:
        raise InputError(f"{data.path} has {name} = {value!r}; it must be one of {', '.join(ACTIVATIONS)}")
    return value


def _shape(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    if name not in shapes:
        raise InputError(f"tensor {name} is missing from the checkpoint; the model's size is read off it")
    if len(shapes[name]) != rank:
        raise InputError(f"tensor {name} has shape {list(shapes[name])}; it must have {rank} axes")
    return shapes[name]


def _root(number: int, name: str) -> int:
    root = math.isqrt(number)
    if root < 1 or root * root != number:
        raise InputError(f"tensor {name} has an axis that makes {number} places of a square; that is no square number")
    return root


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number that stands at the group of `pattern` in any name."""
    numbers = [int(found[1]) for name in shapes if (found := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


def _trunk(llm: _Json, shapes: Shapes) -> TrunkConfig:
    layer = "language_model.model.layers.0"

    def axis(name: str, number: int = 0):
        return lambda: _shape(shapes, name, 2)[number]

    def head_count(name: str):
        return lambda: _shape(shapes, f"{layer}.self_attn.{name}.weight", 2)[0] // head_dim

    def head_width() -> int:
        if llm.data.get("num_attention_heads") is not None:
            return width // llm.get("num_attention_heads", int)
        return _shape(shapes, f"{layer}.self_attn.q_norm.weight", 1)[0]

    width = llm.get("hidden_size", int, axis("language_model.model.embed_tokens.weight", 1))
    head_dim = llm.get("head_dim", int, head_width)
    heads = llm.get("num_attention_heads", int, head_count("q_proj"))
    kv_heads = llm.get("num_key_value_heads", int, head_count("k_proj"))
    if heads % kv_heads:
        raise InputError(f"{llm.path} has {heads} attention heads on {kv_heads} key-value heads; it must divide")
    if head_dim % 2:
        raise InputError(f"{llm.path} gives a head width of {head_dim}; rotary embedding needs an even one")
    return TrunkConfig(
        vocab_size=llm.get("vocab_size", int, axis("language_model.model.embed_tokens.weight")),
        hidden_size=width,
        num_layers=llm.get("num_hidden_layers", int, lambda: _count(shapes, r"language_model\.model\.layers\.(\d+)\.")),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=llm.get("intermediate_size", int, axis(f"{layer}.mlp.gate_proj.weight")),
        rope_theta=_rope_theta(llm),
        norm_eps=llm.get("rms_norm_eps", float, 1e-6),
        activation=_activation(llm, "hidden_act", "silu"),
    )


def _rope_theta(llm: _Json) -> float:
    """The base of rotary embedding; transformers 5 writes it into an object of its own."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = llm.get(name, dict, {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise InputError(f"{llm.path} asks for {name} of type {kind!r}; only plain rotary embedding is supported")
    nested = _Json(llm.get("rope_parameters", dict, {}), llm.path)
    return llm.get("rope_theta", float, lambda: nested.get("rope_theta", float, 10000.0))


def _vit(vit: _Json, shapes: Shapes) -> VitConfig:
    prefix = "vit_model.vision_model"
    layers = _count(shapes, re.escape(prefix) + r"\.encoder\.layers\.(\d+)\.")
    stated = vit.get("num_hidden_layers", int, layers + 1)
    if layers not in (stated, stated - 1) or not layers:
        raise InputError(
            f"the checkpoint holds {layers} ViT layers, but {vit.path} says {stated}, which stands for {stated - 1} or "
            f"{stated}; tensors are missing, or the file is of another model"
        )
    patch_embedding = f"{prefix}.embeddings.patch_embedding.weight"
    channels = vit.get("num_channels", int, 3)
    width = vit.get("hidden_size", int, lambda: _shape(shapes, patch_embedding, 2)[0])
    heads = vit.get("num_attention_heads", int)
    if width % heads:
        raise InputError(f"{vit.path} has {heads} attention heads on a width of {width}; it must divide")
    return VitConfig(
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        mlp_width=vit.get(
            "intermediate_size", int, lambda: _shape(shapes, f"{prefix}.encoder.layers.0.mlp.fc1.weight", 2)[0]
        ),
        patch_size=vit.get(
            "patch_size", int, lambda: _root(_shape(shapes, patch_embedding, 2)[1] // channels, patch_embedding)
        ),
        num_positions=_shape(shapes, f"{prefix}.embeddings.position_embedding.weight", 2)[0],
        channels=channels,
        norm_eps=vit.get("layer_norm_eps", float, 1e-6),
        activation=_activation(vit, "hidden_act", "gelu_pytorch_tanh"),
    )


def _autoencoder(shapes: Shapes, stated: _Json) -> AutoencoderConfig:
    base, image_channels = _shape(shapes, "encoder.conv_in.weight", 4)[:2]
    # The decoder has a block more on each level than the encoder, which may have none and so tell nothing.
    levels = max(1, _count(shapes, r"decoder\.up\.(\d+)\."))
    widths = tuple(_shape(shapes, f"decoder.up.{i}.block.0.conv1.weight", 4)[0] for i in range(levels))
    for width in (base, *widths):
        if width % NORM_GROUPS:
            raise InputError(f"the autoencoder has a width of {width}; it must be a multiple of {NORM_GROUPS}")
    return AutoencoderConfig(
        image_channels=image_channels,
        base_width=base,
        widths=widths,
        num_res_blocks=_count(shapes, r"decoder\.up\.\d+\.block\.(\d+)\.") - 1,
        latent_channels=_shape(shapes, "decoder.conv_in.weight", 4)[1],
        scale_factor=stated.get("scale_factor", float, _SCALE_FACTOR),
        shift_factor=stated.get("shift_factor", float, _SHIFT_FACTOR, signed=True),
    )
