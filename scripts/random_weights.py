#!/usr/bin/env python3
"""Writes a BAGEL model with random weights in the published layout, in any size; for benchmarks and comparisons."""

from __future__ import annotations

import argparse
import math
import sys
import zlib
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tqdm import tqdm

from bagel_jax.checkpoint.export import StoredArray, export
from bagel_jax.checkpoint.table import Target, resolve
from bagel_jax.command import BAD_INPUT, DONE, Parser
from bagel_jax.config import AutoencoderConfig, BagelConfig, TrunkConfig, VitConfig
from bagel_jax.demo.example import MODEL
from bagel_jax.errors import InputError, check_whole
from bagel_jax.inputs.tokenizer import Tokenizer
from bagel_jax.models.autoencoder import NORM_GROUPS
from bagel_jax.models.weights import abstract_weights, flatten
from bagel_jax.train.start import sine_table

# Flag, default, what it is. The defaults make a model of 105 million parameters that two CPU cores can still run.
SIZES = (
    ("hidden-size", 512, "D, width of the language model"),
    ("layers", 8, "L"),
    ("heads", 8, "H, query heads; each is D / H wide, as in the official code"),
    ("kv-heads", 2, "K, key-value heads"),
    ("mlp", 2560, "F, width of each expert's MLP"),
    ("vit-hidden-size", 256, "width of the ViT"),
    ("vit-layers", 4, "of the ViT"),
    ("vit-heads", 4, "of the ViT"),
    ("vit-mlp", 1024, "width of the ViT's MLP"),
    ("vit-patch", 14, "pixels along a ViT patch"),
    ("max-vit-patches", 70, "ViT patches along one side of an image, at most"),
    ("ae-channels", 64, "channels of the autoencoder's finest level"),
    ("ae-blocks", 2, "residual blocks on each level of the autoencoder"),
    ("latent-channels", 16, "C, of the autoencoder's latents"),
    ("latent-patch", 2, "latent cells along a token"),
    ("max-latent-size", 64, "latent tokens along one side of an image, at most"),
)

# What differs in the published model.
PUBLISHED = {
    "hidden_size": 3584,
    "layers": 28,
    "heads": 28,
    "kv_heads": 4,
    "mlp": 18944,
    "vit_hidden_size": 1152,
    "vit_layers": 26,
    "vit_heads": 16,
    "vit_mlp": 4304,
    "ae_channels": 128,
    "vocab_size": 152064,
}


def parser() -> Parser:
    """The command line."""
    p = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("destination", metavar="DST", type=Path, help="the directory to write; must not exist")
    for flag, default, about in SIZES:
        p.add_argument(f"--{flag}", type=int, default=default, metavar="N", help=about)
    p.add_argument(
        "--ae-multipliers",
        type=int,
        nargs="+",
        default=[1, 2, 4, 4],
        metavar="M",
        help="channels of each level of the autoencoder, finest first, in units of --ae-channels",
    )
    p.add_argument("--vocab-size", type=int, metavar="N", help="V; None: the tokenizer's, rounded up to 64s")
    p.add_argument("--tokenizer-from", type=Path, default=MODEL, metavar="DIR", help="where tokenizer files are")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of every tensor")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="of the weights")
    p.add_argument(
        "--published",
        action="store_true",
        help="the published 7B's sizes in place of all defaults; fewer layers are --layers and --vit-layers",
    )
    p.add_argument(
        "--repeat",
        action="store_true",
        help="one random block over and over, and all layers the same: a model of many gigabytes at the disk's speed",
    )
    return p


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The options, those of `--published` filled in."""
    p = parser()
    if p.parse_args(argv).published:
        p.set_defaults(**PUBLISHED)
    return p.parse_args(argv)


def config_of(a: argparse.Namespace) -> BagelConfig:
    """The sizes asked for; raises `InputError` for sizes that no such model can have."""
    for flag, _, _ in SIZES:
        check_whole(f"--{flag}", getattr(a, flag.replace("-", "_")), 1)
    for multiplier in a.ae_multipliers:
        check_whole("--ae-multipliers", multiplier, 1)
    check_whole("--seed", a.seed, 0)
    for name, whole, part, by in (
        # Rotary embedding turns pairs of a head's numbers.
        ("--hidden-size", a.hidden_size, 2 * a.heads, "twice --heads"),
        ("--hidden-size", a.hidden_size, 4, "sines and cosines of a row and a column"),
        ("--heads", a.heads, a.kv_heads, "--kv-heads"),
        ("--vit-hidden-size", a.vit_hidden_size, a.vit_heads, "--vit-heads"),
        ("--ae-channels", a.ae_channels, NORM_GROUPS, "the groups of its norms"),
    ):
        if whole % part:
            raise InputError(f"{name} is {whole}; it must be a multiple of {part} ({by})")
    # No public name tells it, and a vocabulary that is too small would fail at the first such text only.
    least = max(Tokenizer(a.tokenizer_from)._tokenizer.get_vocab().values()) + 1
    vocab_size = -(-least // 64) * 64 if a.vocab_size is None else a.vocab_size
    check_whole("--vocab-size", vocab_size, least)
    widths, places = tuple(a.ae_channels * m for m in a.ae_multipliers), a.max_vit_patches**2
    activation = "gelu_pytorch_tanh"
    return BagelConfig(
        trunk=TrunkConfig(
            vocab_size, a.hidden_size, a.layers, a.heads, a.kv_heads, a.hidden_size // a.heads, a.mlp, 1e6, 1e-6, "silu"
        ),
        vit=VitConfig(
            a.vit_hidden_size, a.vit_layers, a.vit_heads, a.vit_mlp, a.vit_patch, places, 3, 1e-6, activation
        ),
        autoencoder=AutoencoderConfig(3, a.ae_channels, widths, a.ae_blocks, a.latent_channels, 0.3611, 0.1159),
        latent_patch_size=a.latent_patch,
        max_latent_size=a.max_latent_size,
        max_vit_patches=a.max_vit_patches,
        connector_activation=activation,
        time_frequencies=256,
        interpolate_positions=False,
    )


def draw(target: Target, config: BagelConfig, seed: int) -> np.ndarray:
    """Values of one parameter, the same whatever else the model has, at which activations neither fade nor blow up."""
    *_, module, kind = target.path.split(".")
    if module in ("latent_positions", "vit_positions"):
        side = config.max_latent_size if module == "latent_positions" else config.max_vit_patches
        return sine_table(side, config.trunk.hidden_size)
    if kind == "scale":
        return np.ones(target.shape, np.float32)
    # Sums of fan-in products keep the size of their inputs; what is added stays small beside them.
    std = 1 / math.sqrt(math.prod(target.source_shape[1:])) if kind == "kernel" else 0.02
    generator = np.random.default_rng([seed, zlib.crc32(target.path.encode())])
    return np.float32(std) * generator.standard_normal(target.shape, np.float32)


def repeated(target: Target, config: BagelConfig, seed: int) -> np.ndarray:
    """Values as `draw`'s in bfloat16, from one block that is much smaller; a view that repeats one layer."""
    *_, module, kind = target.path.split(".")
    if kind == "scale" or module in ("latent_positions", "vit_positions"):
        return draw(target, config, seed)
    std = 1 / math.sqrt(math.prod(target.source_shape[1:])) if kind == "kernel" else 0.02
    # A prime, so that no two rows of a matrix begin alike.
    block = np.random.default_rng(seed).standard_normal(1_000_003, np.float32) * np.float32(std)
    layer = target.to_target(np.resize(block.astype(ml_dtypes.bfloat16), target.source_shape))
    return np.broadcast_to(layer, target.shape)


def main() -> int:
    """Runs the command line; returns the exit code: 0 or 2 (bad input)."""
    args = parse_args(sys.argv[1:])
    try:
        config = config_of(args)
        shapes = {path: x.shape for path, x in flatten(abstract_weights(config, jnp.float32).params).items()}
        kind, targets, values = np.dtype(np.float32), resolve(shapes), repeated if args.repeat else draw
        arrays = {t.path: StoredArray(t.shape, kind, partial(values, t, config, args.seed)) for t in targets}
        with tqdm(total=len(arrays), desc="writing", unit="parameter") as bar:
            tokenizer, dtype = args.tokenizer_from, jnp.dtype(args.dtype)
            export(arrays, config, tokenizer, args.destination, dtype, lambda done, _: bar.update(done - bar.n))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(f"wrote {args.destination}: {sum(map(math.prod, shapes.values())):,} parameters")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
