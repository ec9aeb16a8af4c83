"""BAGEL on one page: what the model computes, as pure functions of parameters and arrays.

    definition, params = bagel.functional()                  # static and hashable; a dict of arrays by dotted path
    prepared = bagel.prepare(Request.create("text2img", "a red circle"))
    seen = contexts(definition, params, prepared)            # keys and values: cond, drop_text, drop_image
    v = velocity(definition, params, x, t, seen.cond, prepared.latent_grid)
    x = denoise(definition, params, prepared.initial_latent, seen, prepared.latent_grid, timesteps(50, 3.0))
    pixels = decode(definition, params, x, prepared.latent_grid)
    chances = log_prob(definition, params, prepared, "an answer")

All of it compiles, differentiates (forward and reverse; by parameters, latents and contexts), vectorises and shards.
Without pages, batches and padding, it is what the engine's programs are tested against, and where to try something new:
another guidance, another solver, a hook that sees and changes what layers compute. Programs are compiled for shapes and
for static arguments (`definition`, grids, guidance, solver, hook), which are compared by `==`: pass the same function
again instead of making a new one, and nothing is compiled twice.

Which token lies where, what it sees and which expert reads it is `layout.py`'s alone.

Source: `inferencer.py` and `modeling/bagel/bagel.py` of the official code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bagel_jax import layout
from bagel_jax.config import BagelConfig
from bagel_jax.errors import InputError
from bagel_jax.inputs.prepare import Prepared, latent_positions, vit_positions
from bagel_jax.inputs.tokenizer import Tokenizer
from bagel_jax.layout import KVPrefix, Position, Text, VaeImage, VitImage
from bagel_jax.models.attention import KV, attend
from bagel_jax.models.bagel import BagelModel
from bagel_jax.models.layers import scan_layers
from bagel_jax.models.mot import Block
from bagel_jax.models.weights import Skeleton, Weights, fill, flatten
from bagel_jax.request import Settings
from bagel_jax.sampling import schedule
from bagel_jax.sampling.flow import CFG, Guiding, Solver, Velocities, cfg, euler

__all__ = ["CFG", "Context", "Contexts", "Definition", "Guiding", "Solver", "Velocities", "cfg", "contexts", "decode"]
__all__ += ["denoise", "encode", "euler", "log_prob", "logits", "timesteps", "velocity"]

Params = Mapping[str, jax.Array]
# hook(layer, q [T, H, E], k [T, K, E], v [T, K, E], hidden [T, D]) gives the four again, changed, or None. Every layer
# calls it, with its number (traced, int32), before attention; tokens are in order of their places.
Hook = Callable[..., tuple[jax.Array, jax.Array, jax.Array, jax.Array] | None]


@dataclass(frozen=True)
class Definition:
    """Everything of a model but its arrays; static, and equal for the same loaded model."""

    config: BagelConfig
    skeleton: Skeleton
    paths: tuple[str, ...]  # of the parameters, in the skeleton's order
    tokenizer: Tokenizer

    @classmethod
    def of(cls, weights: Weights, config: BagelConfig, tokenizer: Tokenizer) -> tuple[Definition, dict[str, jax.Array]]:
        """A model's definition, and its parameters by dotted path."""
        params = flatten(weights.params)
        paths = jax.tree.leaves(fill(weights, {path: path for path in params}).params)
        return cls(config, weights.skeleton, tuple(paths), tokenizer), params

    def model(self, params: Params) -> BagelModel:
        """The networks with these parameters."""
        return self.skeleton.merge([params[path] for path in self.paths])

    def text(self, text: str | Sequence[int]) -> Text:
        """The segment of a text, or of a text's own token ids; raises InputError for an id that there is not."""
        made = (
            Text(self.tokenizer.prompt(text)) if isinstance(text, str) else self.tokenizer.special.text(map(int, text))
        )
        size = self.config.trunk.vocab_size
        if not all(0 <= number < size for number in made.ids):
            raise InputError(f"token ids of the text are {list(made.ids)}; each must be from 0 to {size - 1}")
        return made


@partial(jax.tree_util.register_dataclass, data_fields=("k", "v"), meta_fields=("rope",))
@dataclass(frozen=True)
class Context:
    """Keys (after norm and RoPE) and values of S tokens, each `[L, S, K, E]`, and the RoPE position behind them."""

    k: jax.Array
    v: jax.Array
    rope: int


@partial(jax.tree_util.register_dataclass, data_fields=("distinct",), meta_fields=("branches",))
@dataclass(frozen=True)
class Contexts:
    """The three contexts of a request. Equal ones are one, computed and differentiated once."""

    distinct: tuple[Context, ...]
    branches: tuple[int, int, int]  # which of them are `cond`, `drop_text`, `drop_image`

    cond = property(lambda self: self.distinct[self.branches[0]], doc="The full context.")
    drop_text = property(lambda self: self.distinct[self.branches[1]], doc="Without the last text.")
    drop_image = property(lambda self: self.distinct[self.branches[2]], doc="Without images.")


# -------------------------------------------------------------------------------------------- tokens to hidden states


def _through(definition, params, segments, contents, past: Context, hook) -> tuple[Block, KV]:
    """The T tokens of segments behind the S of a context, which they see as `layout.tokens` says.

    `contents(segment)` is a block's `[n, D]`, embedded. Returns the last layer's output (each expert's tokens in order
    of their places, not normed), and the tokens' own keys and values, `[L, T, K, E]`.
    """
    placed = layout.place(segments, Position(past.k.shape[1], past.rope))
    tokens = layout.tokens(placed, definition.tokenizer.special.markers)
    read = tokens.of(tokens.expert == layout.UNDERSTANDING)
    order = np.argsort(tokens.expert, kind="stable")  # experts are chosen by slicing: the understanding one's first
    blocks = [(segment.kind, contents(segment)) for segment in segments if isinstance(segment, VitImage | VaeImage)]
    patches, latents = ([x for kind, x in blocks if kind == wanted] for wanted in (layout.VIT, layout.VAE))
    words, places = np.maximum(read.id, 0), np.flatnonzero(read.kind == layout.VIT)
    embedded = words, places, patches, latents
    return _trunk(definition, params, embedded, order, tokens.rope, tokens.kv_end, KV(past.k, past.v), hook)


@partial(jax.jit, static_argnames=("definition", "hook"))
def _trunk(definition, params, embedded, order, rope, kv_end, past: KV, hook):
    """All layers. `rope` and `kv_end` are in order of places, as attention is; `order` sorts that by expert."""
    trunk, c = definition.model(params).trunk, definition.config.trunk
    words, places, patches, latents = embedded
    und = trunk.embed(words)
    und = und.at[places].set(jnp.concatenate(patches)) if patches else und
    back = jnp.argsort(order)

    def step(layer, x: Block, this):
        number, before = this
        q, k, v = (part.joined(0)[back] for part in layer.qkv(x, rotation))
        if hook is not None:
            hidden = x.joined(0)[back]
            q, k, v, hidden = hook(number, q, k, v, hidden) or (q, k, v, hidden)
            x = x.split(hidden[order].astype(x.und.dtype), 0)
        seen = KV(jnp.concatenate([before.k, k]), jnp.concatenate([before.v, v]))
        return layer.finish(x, x.split(attend(q, seen, kv_end)[order], 0)), KV(k, v)

    x = Block(und, jnp.concatenate(latents) if latents else None)
    rotation = trunk.rotation(x, rope[order])
    # Under a gradient each layer keeps no more than what goes into it.
    return scan_layers(trunk.layers, step, x, (jnp.arange(c.num_layers), past), remat=True)


# ----------------------------------------------------------------------------------------------------------- contexts


def contexts(
    definition: Definition,
    params: Params,
    prepared: Prepared,
    *,
    thought: str | Sequence[int] | None = None,
    hook: Hook | None = None,
) -> Contexts:
    """Keys and values of a request's contexts: of its texts, and of its images through both encoders.

    A request that thinks before it draws needs `thought`, its plan: the text, or the text's own token ids. The hook is
    called for each sequence that is computed.

    Raises:
        InputError: there is no thought where there must be one, or one where there must be none.
    """
    if (thought is not None) != (prepared.request.think and prepared.request.makes_image):
        raise InputError(f"thought is {thought!r}; a request that thinks before it draws must have one, no other may")
    plan, sequences = prepared.plan, list(prepared.plan.sequences)
    prefixes = [plan.cond, plan.drop_text, plan.drop_image]
    if thought is not None:  # it is in the full context only
        (placed,) = layout.place([definition.text(thought)], Position(plan.cond.length, plan.cond.rope))
        sequences[0] = dataclasses.replace(sequences[0], compute=(*sequences[0].compute, placed))
        prefixes[0] = KVPrefix(0, *placed.behind)
    computed = _sequences(definition, params, prepared, sequences, hook)
    unique = list(dict.fromkeys(prefixes))
    distinct = (Context(*(x[:, : p.length] for x in computed[p.sequence]), p.rope) for p in unique)
    return Contexts(tuple(distinct), tuple(map(unique.index, prefixes)))


def _sequences(definition, params, prepared, sequences, hook) -> list[KV]:
    """Keys and values of each sequence of a plan, `[L, S, K, E]`, whose first ones may be an earlier sequence's."""
    c, dtype = definition.config.trunk, params["trunk.embed.embedding"].dtype
    none = KV(*(jnp.zeros((c.num_layers, 0, c.num_kv_heads, c.head_dim), dtype) for _ in range(2)))
    contents, computed = partial(_image_block, definition, params, prepared), []
    for one in sequences:
        source = none if one.copy_from is None else computed[one.copy_from]
        past = Context(*(x[:, : one.shared] for x in source), one.compute[0].rope)
        own = _through(definition, params, [p.segment for p in one.compute], contents, past, hook)[1]
        computed.append(KV(*(jnp.concatenate(both, axis=1) for both in zip((past.k, past.v), own, strict=True))))
    return computed


def _image_block(definition, params, prepared, segment) -> jax.Array:
    """An input image's patches or clean latents, embedded, `[n, D]`."""
    image, c = prepared.images[segment.image], definition.config
    if segment.kind == layout.VIT:
        return _embed_patches(definition, params, image.vit_patches, vit_positions(image, c))
    latents = _encode(definition, params, image.vae_pixels, prepared.posterior_noise[segment.image])
    return _embed_latents(definition, params, latents, 0.0, latent_positions((segment.rows, segment.columns), c))


@partial(jax.jit, static_argnames="definition")
def _embed_patches(definition, params, patches, position_ids):
    return definition.model(params).embed_vit(patches, position_ids, len(patches))


@partial(jax.jit, static_argnames="definition")
def _embed_latents(definition, params, latents, t, position_ids):
    t = jnp.asarray(t, jnp.float32).reshape(1, 1)
    return definition.model(params).embed_latents(latents[None], t, position_ids)[0]


# ------------------------------------------------------------------------------------------------------------- images


@partial(jax.jit, static_argnames=("definition", "grid", "hook"))
def velocity(
    definition: Definition,
    params: Params,
    x: jax.Array,
    t: jax.Array | float,
    context: Context,
    grid: tuple[int, int],
    *,
    hook: Hook | None = None,
) -> jax.Array:
    """The velocity, from data to noise, of latents on a grid of so many rows and columns, behind one context.

    Latents are `[N, C p²]`, and so is what comes back, float32; `t` is a scalar in (0, 1], 1 being noise.

    Raises:
        InputError: latents of another shape, or a grid that the model has no positions for.
    """
    _check(definition, x, grid)
    latents = _embed_latents(definition, params, x, t, latent_positions(grid, definition.config))
    block = VaeImage(0, *grid, noised=True)
    hidden, _ = _through(definition, params, [block], lambda _: latents, context, hook)
    return definition.model(params).velocity(hidden.gen)


@partial(jax.jit, static_argnames=("definition", "grid", "guidance", "solver", "hook"))
def denoise(
    definition: Definition,
    params: Params,
    x: jax.Array,
    contexts: Contexts,
    grid: tuple[int, int],
    timesteps: jax.Array,
    *,
    guidance: Guiding = cfg(),  # noqa: B008
    solver: Solver = euler,
    hook: Hook | None = None,
) -> jax.Array:
    """Noise `[N, C p²]` to latents of the same shape, float32, along the points `timesteps`, falling from 1 to 0.

    `CFG(request.settings)` is a request's own guidance. The hook is called for each branch that is computed.

    Raises:
        InputError: as `velocity`.
    """
    _check(definition, x, grid)

    def field(step, x, t, state):
        needed, found = (True, *guidance.needs(t)), []
        for number, context in enumerate(contexts.distinct):
            flags = [flag for flag, branch in zip(needed, contexts.branches, strict=True) if branch == number]
            compute = partial(velocity, definition, params, x, t, context, grid, hook=hook)
            skip = partial(jnp.zeros, x.shape, jnp.float32)
            if any(flag is True for flag in flags):
                found.append(compute())
            elif traced := [flag for flag in flags if flag is not False]:
                found.append(jax.lax.cond(jnp.any(jnp.stack(traced)), compute, skip))
            else:
                found.append(skip())
        return guidance(step, t, state, Velocities(*(found[branch] for branch in contexts.branches)), x)

    def step(carry, this):
        number, t, following = this
        return solver(partial(field, number), carry[0], t, following, carry[1]), None

    t = jnp.asarray(timesteps, jnp.float32)
    start = jnp.asarray(x, jnp.float32), guidance.init(x.shape)
    # Under a gradient each step keeps no more than what goes into it.
    return jax.lax.scan(jax.checkpoint(step), start, (jnp.arange(len(t) - 1), t[:-1], t[1:]))[0][0]


def timesteps(steps: int = 50, shift: float = 3.0) -> np.ndarray:
    """`steps` points from 1 to 0, one more than evaluations; raises InputError for a value out of range."""
    s = Settings(steps=steps, timestep_shift=shift)
    return schedule.timesteps(s.steps, s.timestep_shift)


@partial(jax.jit, static_argnames=("definition", "grid"))
def decode(definition: Definition, params: Params, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Latents `[N, C p²]` to pixels `[H, W, 3]`, float32 in [0, 1]; raises InputError as `velocity`."""
    _check(definition, x, grid)
    model = definition.model(params)
    return jnp.clip(model.autoencoder.decode(model.unpatchify_latents(x, *grid)[None])[0] * 0.5 + 0.5, 0, 1)


def encode(definition: Definition, params: Params, pixels: jax.Array, noise: jax.Array | None = None) -> jax.Array:
    """Pixels `[H, W, 3]` in [0, 1] to latents `[N, C p²]`, drawn with `noise` `[h, w, C]`; None: the most likely."""
    return _encode(definition, params, 2 * pixels - 1, 0.0 if noise is None else noise)


@partial(jax.jit, static_argnames="definition")
def _encode(definition, params, pixels, noise):
    model = definition.model(params)
    return model.patchify_latents(model.autoencoder.encode(pixels[None], noise)[0])


def _check(definition, x, grid) -> None:
    limit, width = definition.config.max_latent_size, definition.config.latent_dim
    if not all(1 <= side <= limit for side in grid):
        raise InputError(f"grid is {grid}; rows and columns must be from 1 to {limit} for this model")
    if jnp.shape(x) != (grid[0] * grid[1], width):
        raise InputError(f"x has shape {jnp.shape(x)}; for grid {grid} it must be {(grid[0] * grid[1], width)}")


# --------------------------------------------------------------------------------------------------------------- text


def logits(
    definition: Definition, params: Params, prepared: Prepared, answer: str | Sequence[int], *, hook: Hook | None = None
) -> jax.Array:
    """What the model expects of an answer, token by token, given all tokens before (teacher forcing).

    `answer` is a text, or a text's own token ids. Returns `[T, V]` float32, T one more than the ids: row i is about
    token i, the last one about the answer's end. The hook is called for the prompt, then for the answer.

    Raises:
        InputError: a token id that the model has not.
    """
    fed = Text(definition.text(answer).ids[:-1])
    (past,) = _sequences(definition, params, prepared, prepared.plan.sequences[:1], hook)
    past = Context(*past, prepared.plan.cond.rope)
    hidden, _ = _through(definition, params, [fed], None, past, hook)
    trunk = definition.model(params).trunk
    return trunk.logits(trunk.norm(hidden.und))


def log_prob(
    definition: Definition, params: Params, prepared: Prepared, answer: str | Sequence[int], *, hook: Hook | None = None
) -> jax.Array:
    """The log-probability of each token of an answer, its end included: `[T]` float32. Arguments: see `logits`."""
    chances = jax.nn.log_softmax(logits(definition, params, prepared, answer, hook=hook))
    return jnp.take_along_axis(chances, np.asarray(definition.text(answer).ids[1:])[:, None], axis=1)[:, 0]
