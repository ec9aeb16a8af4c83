"""The ViT."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import CONFIG, weights


def patches(count, seed=0):
    return np.random.RandomState(seed).standard_normal((count, 588)).astype(np.float32)


@jax.jit
def run(params, x, positions, length):
    return nnx.merge(weights().graph, params).vit(x, positions, length)


def vit(x, positions=None, length=None, params=None):
    positions = np.arange(len(x), dtype=np.int32) if positions is None else positions
    return np.asarray(run(params or weights().params, x, positions, jnp.int32(len(x) if length is None else length)))


def replaced(name, value):
    """The weights with one parameter set to `value`."""
    return nnx.from_flat_state(
        (path, v.replace(jnp.broadcast_to(value, v.shape)) if ".".join(map(str, path)) == name else v)
        for path, v in nnx.to_flat_state(weights().params)
    )


def test_regression_19_post_layernorm_is_applied():
    """Images are misread: the ViT's last norm is skipped."""
    x = patches(6)
    plain = vit(x, params=replaced("vit.post_norm.scale", 1.0))
    bias = weights().model().vit.post_norm.bias[...]
    # Normed per patch: mean 0 and variance 1, but for the bias.
    np.testing.assert_allclose((plain - bias).mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose((plain - bias).std(-1), 1, rtol=1e-3)
    twice = vit(x, params=replaced("vit.post_norm.scale", 2.0))
    np.testing.assert_allclose(twice - bias, 2 * (plain - bias), rtol=1e-4, atol=1e-5)
    moved = vit(x, params=replaced("vit.post_norm.bias", 5.0))
    np.testing.assert_allclose(moved.mean(), 5, atol=0.2)


@pytest.mark.parametrize("name", ["norm1.scale", "norm2.scale", "q.bias", "v.bias", "o.bias", "fc1.bias", "fc2.bias"])
def test_all_weights_are_used(name):
    """A part of the ViT is left out."""
    path = f"vit.layers.{name}"
    assert np.abs(vit(patches(4), params=replaced(path, 0.3)) - vit(patches(4))).max() > 1e-3


def test_regression_29_padding_is_not_seen():
    """An image is understood otherwise when it is padded."""
    x = patches(5)
    alone = vit(x)
    for rubbish in (0.0, 1e3):
        wide = np.pad(x, ((0, 4), (0, 0)), constant_values=rubbish)
        padded = vit(wide, np.asarray([0, 1, 2, 3, 4, 9, 9, 9, 9], np.int32), 5)
        np.testing.assert_allclose(padded[:5], alone, rtol=1e-4, atol=1e-5)
        assert np.isfinite(padded).all()


def test_every_patch_sees_every_other():
    """Patches see only those before them."""
    x = patches(5)
    for at in (0, 4):
        y = x.copy()
        y[at] += 1
        assert (np.abs(vit(y) - vit(x)).max(-1) > 1e-4).all()


def test_positions_count():
    """The ViT is told nothing of where its patches lie, or only by their order."""
    x = patches(4)
    order = np.asarray([2, 0, 3, 1])
    positions = np.asarray([5, 1, 8, 2], np.int32)
    plain = vit(x, positions)
    np.testing.assert_allclose(vit(x[order], positions[order]), plain[order], rtol=1e-4, atol=1e-5)
    assert np.abs(vit(x, positions[order]) - plain).max() > 1e-3


def test_regression_18_a_patch_is_a_linear_map():
    """The patch embedding reads its pixels in another order than they come in."""
    model = weights().model().vit
    kernel = np.asarray(model.patch_embed.kernel[...], np.float64)
    assert kernel.shape == (588, CONFIG.vit.hidden_size)
    x = patches(3)
    wanted = x.astype(np.float64) @ kernel + np.asarray(model.patch_embed.bias[...])
    np.testing.assert_allclose(model.patch_embed(x), wanted, rtol=1e-4, atol=1e-4)


def test_connector_and_trunk_positions():
    """What the trunk gets of an image lacks the connector, or the trunk's own position table."""
    model = weights().model()
    x, positions = patches(4), np.asarray([3, 1, 0, 7], np.int32)
    out = model.embed_vit(x, positions, jnp.int32(4))
    table = np.asarray(model.vit_positions.embedding[...])
    assert table.shape == (CONFIG.max_vit_patches**2, CONFIG.trunk.hidden_size)
    h = model.vit(x, positions, jnp.int32(4))
    h = jax.nn.gelu(h @ model.connector.fc1.kernel[...] + model.connector.fc1.bias[...], approximate=True)
    h = h @ model.connector.fc2.kernel[...] + model.connector.fc2.bias[...]
    np.testing.assert_allclose(out, h + table[positions], rtol=1e-3, atol=1e-4)
