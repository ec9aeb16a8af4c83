"""The official training objective: cross-entropy of texts, squared error of the velocity of noised images.

Source: `Bagel.forward` in the official `modeling/bagel/bagel.py`, and the loss in `train/pretrain_unified_navit.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bagel_jax.models.bagel import BagelModel
from bagel_jax.models.mot import Block
from bagel_jax.train.packing import Batch

# Logits of at most this many numbers exist at once; the published vocabulary has 152,064.
_MAX_LOGITS = 2**27


class TokenLosses(NamedTuple):
    """The loss of each place, 0 where there is none."""

    ce: jax.Array  # [B, Tt] nats
    mse: jax.Array  # [B, N] mean of the squared error over a token's C p² numbers


def token_losses(
    model: BagelModel, batch: Batch, *, remat: bool = False, place: Callable[[jax.Array], jax.Array] = lambda x: x
) -> TokenLosses:
    """Every place's own loss, in float32; for `remat` and `place` see `loss`."""
    text = model.trunk.embed(batch.ids)
    vit = model.connector(model.vit.packed(batch.patches, batch.vit_positions, batch.vit_mask, remat=remat))
    vit = vit + model.vit_positions(batch.vit_positions)
    t = batch.timestep[..., None]
    noisy = (1 - t) * batch.latents + t * batch.noise
    gen = model.embed_latents(noisy.astype(text.dtype), batch.timestep, batch.latent_positions)
    block = Block(place(jnp.concatenate([text, vit], axis=1)), place(gen))
    out = model.trunk.packed(block, batch.rope, batch.mask, remat=remat)
    velocity = model.latent_out(out.gen).astype(jnp.float32)
    mse = jnp.mean(jnp.square(velocity - (batch.noise - batch.latents)), axis=-1)
    return TokenLosses(
        ce=_cross_entropy(model, out.und[:, : batch.ids.shape[1]], batch.labels),
        mse=jnp.where(batch.timestep > 0, mse, 0.0),
    )


def _cross_entropy(model, hidden, labels):
    """`[B, T, D]`, `[B, T]` -> `[B, T]`, a slice of the tokens at a time where all logits would be too many."""

    def some(hidden, labels):
        logits = model.trunk.logits(hidden)
        right = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(labels >= 0, jax.nn.logsumexp(logits, axis=-1) - right, 0.0)

    rows, tokens, width = hidden.shape
    slices = -(-rows * tokens * model.config.trunk.vocab_size // _MAX_LOGITS)
    if slices == 1:
        return some(hidden, labels)
    size = -(-rows * tokens // slices)
    padding = slices * size - rows * tokens
    hidden = jnp.pad(hidden.reshape(-1, width), ((0, padding), (0, 0))).reshape(slices, size, width)
    labels = jnp.pad(labels.reshape(-1), (0, padding), constant_values=-1).reshape(slices, size)
    ce = jax.lax.map(jax.checkpoint(lambda part: some(*part)), (hidden, labels))
    return ce.reshape(-1)[: rows * tokens].reshape(rows, tokens)


def loss(
    model: BagelModel,
    batch: Batch,
    *,
    ce_weight: float = 1.0,
    mse_weight: float = 1.0,
    remat: bool = False,
    place: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch, and what to report of it.

    Each of the two terms is the mean over the places that have it (weighted by `text_weight` for texts), as in the
    official code; a batch without any has 0.

    Args:
        model: the model.
        batch: what it learns from.
        ce_weight, mse_weight: of the two terms.
        remat: keep only each layer's input for the backward pass.
        place: called on the trunk's inputs `[B, ...]`, to say where they lie.
    """
    each = token_losses(model, batch, remat=remat, place=place)
    noised = jnp.sum(batch.timestep > 0)
    ce = jnp.sum(each.ce * batch.text_weight) / jnp.maximum(jnp.sum(batch.text_weight), 1e-9)
    mse = jnp.sum(each.mse) / jnp.maximum(noised, 1)
    return ce_weight * ce + mse_weight * mse, {"ce": ce, "mse": mse}
