"""One packed training forward of the official code: a ViT image, question, answer, clean image, noised image."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import relative_error

from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.train.objective import loss, token_losses
from bagel_jax.train.packing import Batch, TextPart, VaePart, VitPart, lay_out, pack

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def case():
    with np.load(DATA / "cases" / "train.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def sample(case):
    """The official packed sequence, laid out by our own code from its segments."""
    ids, ends = case["text_ids"], np.cumsum(case["split_lens"])
    at = dict(zip(case["text_indexes"].tolist(), ids.tolist(), strict=True))
    texts = [tuple(at[i] for i in range(ends[0], ends[1])), tuple(at[i] for i in range(ends[1], ends[2]))]
    rows, columns = case["latent_grid"]
    tokens = case["padded_latent"].reshape(2, 16, rows, 2, columns, 2).transpose(0, 2, 4, 3, 5, 1)
    clean, noised = tokens.reshape(2, rows * columns, 64)
    n = rows * columns
    positions, noise = case["latent_position_ids"], case["flow_noise"]
    timestep = 1 / (1 + np.exp(-case["timestep_logits"][-1]))
    parts = [
        VitPart(case["vit_tokens"], case["vit_position_ids"]),
        TextPart(texts[0]),
        TextPart(texts[1], loss=True),
        VaePart(clean, positions[:n]),
        VaePart(noised, positions[n:], float(timestep), noise[n:]),
    ]
    return lay_out(parts, (at[0], at[ends[0] - 1]), patch_dim=588, latent_dim=64)


def test_layout_is_the_official_one(case):
    """Positions, places and labels as the official `pack_sequence` gives them."""
    ours = sample(case)
    order = np.concatenate([ours["text"][:, 3], ours["vit"][:, 2], ours["latent"][:, 2]])
    rope = np.concatenate([ours["text"][:, 2], ours["vit"][:, 1], ours["latent"][:, 1]])
    assert np.array_equal(np.sort(order), np.arange(len(case["position_ids"])))
    assert np.array_equal(rope, case["position_ids"][order])
    assert np.array_equal(ours["text"][:, 3], case["text_indexes"])
    assert np.array_equal(ours["vit"][:, 2], case["vit_indexes"])
    assert np.array_equal(ours["latent"][:, 2], case["vae_indexes"])
    learned = ours["text"][ours["text"][:, 1] >= 0]
    assert np.array_equal(learned[:, 3], case["ce_indexes"])
    assert np.array_equal(learned[:, 1], case["labels"])


def test_losses_are_the_official_ones(case):
    """Cross-entropy of each answer token, squared error of each noised token, and the two means."""
    weights = ModelSource.open(DATA / "tiny-bagel").load(jnp.float32)
    model = nnx.merge(weights.graph, weights.params)
    # Places to spare in every kind: padding must change nothing.
    batch = Batch.of(pack([[sample(case)]], {"text": 32, "vit": 224, "latent": 128}))
    each = token_losses(model, batch)
    ce, mse = np.asarray(each.ce[0]), np.asarray(each.mse[0])
    assert relative_error(ce[np.asarray(batch.labels[0]) >= 0], case["ce"]) < 1e-4
    assert relative_error(mse[np.asarray(batch.timestep[0]) > 0], case["mse"].mean(axis=-1)) < 1e-4
    total, parts = loss(model, batch, ce_weight=0.25, mse_weight=2.0)
    assert float(parts["ce"]) == pytest.approx(case["ce"].mean(), rel=1e-4)
    assert float(parts["mse"]) == pytest.approx(case["mse"].mean(), rel=1e-4)
    assert float(total) == pytest.approx(0.25 * case["ce"].mean() + 2 * case["mse"].mean(), rel=1e-4)
