"""The name table: which tensor of the published checkpoint fills which parameter of `BagelModel`.

One row a kind of parameter. `{l}` in a source runs over the layers that are stacked in the target; `{path}` stands
for the same words on both sides. The autoencoder's modules are named as its checkpoint names them, so three rows map
all of it. Where a parameter has an axis of heads and one of their width, the tensor has one axis for both (`heads`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from bagel_jax.errors import InputError

# Source axes in the order of the target's axes.
LINEAR = (1, 0)  # [out, in] -> [in, out]
CONV = (2, 3, 1, 0)  # [out, in, height, width] -> [height, width, in, out]

MAIN, AUTOENCODER = "ema", "ae"


@dataclass(frozen=True)
class Row:
    """One row of the table: the parameter's path, the tensor's name, the axes, the file, the component, the heads."""

    target: str
    source: str
    axes: tuple[int, ...] | None = None  # of the target with its heads joined
    file: str = MAIN
    component: str = ""
    heads: tuple[int, int] | None = None  # two neighbours of the target's axes, layers not counted: one in the source

    @property
    def stacked(self) -> bool:
        """Whether the target holds all layers of the source on a leading axis."""
        return "{l}" in self.source

    def match(self, path: str) -> str | None:
        """The source's name (with `{l}` still in it) for a parameter's path, or None."""
        pattern = re.escape(self.target).replace(r"\{path\}", "(?P<path>.+)")
        found = re.fullmatch(pattern, path)
        if found is None:
            return None
        return self.source.replace("{path}", found.groupdict().get("path", ""))


def _linear(target, source, component, *, bias=True, kernel_heads=None, bias_heads=None) -> list[Row]:
    rows = [Row(f"{target}.kernel", f"{source}.weight", LINEAR, MAIN, component, kernel_heads)]
    return rows + ([Row(f"{target}.bias", f"{source}.bias", None, MAIN, component, bias_heads)] if bias else [])


def _layer_norm(target, source, component) -> list[Row]:
    return [
        Row(f"{target}.scale", f"{source}.weight", None, MAIN, component),
        Row(f"{target}.bias", f"{source}.bias", None, MAIN, component),
    ]


def _trunk() -> list[Row]:
    component = "embedding and head"
    rows = [Row("trunk.embed.embedding", "language_model.model.embed_tokens.weight", None, MAIN, component)]
    rows += _linear("trunk.lm_head", "language_model.lm_head", component, bias=False)
    for expert, suffix, component in (
        ("und", "", "understanding expert"),
        ("gen", "_moe_gen", "generation expert"),
    ):
        layer, target = "language_model.model.layers.{l}", f"trunk.layers.{expert}"
        for name in "qkv":
            source = f"{layer}.self_attn.{name}_proj{suffix}"
            rows += _linear(f"{target}.{name}", source, component, kernel_heads=(1, 2), bias_heads=(0, 1))
        source = f"{layer}.self_attn.o_proj{suffix}"
        rows += _linear(f"{target}.o", source, component, bias=False, kernel_heads=(0, 1))
        for name in ("gate", "up", "down"):
            rows += _linear(f"{target}.{name}", f"{layer}.mlp{suffix}.{name}_proj", component, bias=False)
        norms = {
            "q_norm": f"self_attn.q_norm{suffix}",
            "k_norm": f"self_attn.k_norm{suffix}",
            "input_norm": f"input_layernorm{suffix}",
            "post_norm": f"post_attention_layernorm{suffix}",
        }
        for name, source in norms.items():
            rows.append(Row(f"{target}.{name}.scale", f"{layer}.{source}.weight", None, MAIN, component))
        final = "trunk.norm" if expert == "und" else "trunk.norm_gen"
        rows.append(Row(f"{final}.scale", f"language_model.model.norm{suffix}.weight", None, MAIN, component))
    return rows


def _vit() -> list[Row]:
    component, vit = "vit", "vit_model.vision_model"
    embeddings, layer = f"{vit}.embeddings", f"{vit}.encoder.layers.{{l}}"
    rows = _linear("vit.patch_embed", f"{embeddings}.patch_embedding", component)
    rows.append(Row("vit.positions.embedding", f"{embeddings}.position_embedding.weight", None, MAIN, component))
    for name, source in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}.items():
        rows += _linear(f"vit.layers.{name}", f"{layer}.self_attn.{source}", component)
    for name in ("fc1", "fc2"):
        rows += _linear(f"vit.layers.{name}", f"{layer}.mlp.{name}", component)
    for number in "12":
        rows += _layer_norm(f"vit.layers.norm{number}", f"{layer}.layer_norm{number}", component)
    return rows + _layer_norm("vit.post_norm", f"{vit}.post_layernorm", component)


def _connectors() -> list[Row]:
    component = "connectors and positions"
    rows = []
    for target, source in {
        "connector.fc1": "connector.fc1",
        "connector.fc2": "connector.fc2",
        "time_embed.fc1": "time_embedder.mlp.0",
        "time_embed.fc2": "time_embedder.mlp.2",
        "latent_in": "vae2llm",
        "latent_out": "llm2vae",
    }.items():
        rows += _linear(target, source, component)
    for target, source in {"vit_positions": "vit_pos_embed", "latent_positions": "latent_pos_embed"}.items():
        rows.append(Row(f"{target}.embedding", f"{source}.pos_embed", None, MAIN, component))
    return rows


def _autoencoder() -> list[Row]:
    component = "autoencoder"
    return [
        Row("autoencoder.{path}.kernel", "{path}.weight", CONV, AUTOENCODER, component),
        Row("autoencoder.{path}.scale", "{path}.weight", None, AUTOENCODER, component),
        Row("autoencoder.{path}.bias", "{path}.bias", None, AUTOENCODER, component),
    ]


TABLE: tuple[Row, ...] = (*_trunk(), *_vit(), *_connectors(), *_autoencoder())
COMPONENTS: tuple[str, ...] = tuple(dict.fromkeys(row.component for row in TABLE))


@dataclass(frozen=True)
class Target:
    """One parameter and the tensors that fill it."""

    path: str
    shape: tuple[int, ...]
    row: Row
    sources: tuple[str, ...]  # one, or one a layer

    @property
    def joined_shape(self) -> tuple[int, ...]:
        """The target's own shape with heads and their width as one axis: as a source has it, but for `row.axes`."""
        if self.row.heads is None:
            return self.shape
        first = self.row.heads[0] + self.row.stacked
        heads, width = self.shape[first : first + 2]
        return (*self.shape[:first], heads * width, *self.shape[first + 2 :])

    @property
    def axes(self) -> tuple[int, ...]:
        """Source axes in the order of the target's, layers left out and heads joined."""
        return self.row.axes or tuple(range(len(self.joined_shape) - self.row.stacked))

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The shape that each source must have."""
        return self._in_source_order(self.joined_shape[self.row.stacked :])

    def source_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Where a part of the target is in each source.

        Args:
            index: slices with start and stop, one an axis of the target, layers left out.

        Raises:
            ValueError: it cuts inside a head.
        """
        layers = (slice(0, 1),) * self.row.stacked
        return self._in_source_order(self.joined_index((*layers, *index))[self.row.stacked :])

    def joined_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Where a part of the target is in an array of `joined_shape`.

        Args:
            index: slices with start and stop, one an axis of the target.

        Raises:
            ValueError: it cuts inside a head.
        """
        if self.row.heads is None:
            return index
        first = self.row.heads[0] + self.row.stacked
        heads, width = index[first : first + 2]
        size = self.shape[first + 1]
        if (width.start, width.stop) != (0, size):
            raise ValueError(
                f"{self.path} is asked for from {width.start} to {width.stop} of each head's {size} numbers; a "
                "head is read whole"
            )
        return (*index[:first], slice(heads.start * size, heads.stop * size), *index[first + 2 :])

    def to_target(self, tensor: np.ndarray) -> np.ndarray:
        """A source, or a part of one that cuts no head, as a layer of the target has it; a view."""
        tensor = tensor.transpose(self.axes)
        if self.row.heads is None:
            return tensor
        first = self.row.heads[0]
        width = self.shape[first + 1 + self.row.stacked]
        return tensor.reshape(*tensor.shape[:first], -1, width, *tensor.shape[first + 1 :])

    def to_source(self, layer: np.ndarray) -> np.ndarray:
        """A layer of the target as its source has it, the way back of `to_target`."""
        return layer.reshape(self.joined_shape[self.row.stacked :]).transpose(np.argsort(self.axes))

    def _in_source_order(self, of_target: tuple) -> tuple:
        return tuple(of_target[axis] for axis in np.argsort(self.axes))


def resolve(shapes: dict[str, tuple[int, ...]], table: tuple[Row, ...] = TABLE) -> list[Target]:
    """What fills each parameter.

    Args:
        shapes: path and shape of every parameter of the model.
        table: the name table.

    Raises:
        InputError: a parameter has no row, or more than one, or two parameters ask for the same tensor.
    """
    targets, taken = [], {}
    for path, shape in shapes.items():
        matches = [(row, name) for row in table if (name := row.match(path)) is not None]
        if len(matches) != 1:
            raise InputError(f"parameter {path} has {len(matches)} rows in the name table; it needs exactly one")
        row, name = matches[0]
        sources = tuple(name.replace("{l}", str(layer)) for layer in range(shape[0])) if row.stacked else (name,)
        for source in sources:
            if (other := taken.setdefault((row.file, source), path)) != path:
                raise InputError(f"tensor {source} fills both {other} and {path}; it may fill only one")
        targets.append(Target(path, tuple(shape), row, sources))
    return targets
