"""Guidance against the official formulas, written again in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bagel_jax.request import RENORM_TYPES, Settings
from bagel_jax.sampling.guidance import branches_on, combine
from bagel_jax.sampling.guidance import guidance as guidance_of

compiled = jax.jit(combine)


def settings(text_scale, img_scale, kind="global", renorm_min=0.0):
    return Settings(cfg_text_scale=text_scale, cfg_img_scale=img_scale, cfg_renorm_type=kind, cfg_renorm_min=renorm_min)


def guidance(*args):
    return guidance_of(settings(*args))


def velocities(seed=0, tokens=6, width=8):
    generator = np.random.RandomState(seed)
    return [generator.standard_normal((tokens, width)).astype(np.float32) for _ in range(3)]


def official(main, text, img, text_scale, img_scale, kind, renorm_min):
    """`_forward_flow` of the official bagel.py, in float64."""
    main, text, img = (np.asarray(v, np.float64) for v in (main, text, img))
    guided = text + text_scale * (main - text)
    if kind == "text_channel":
        ratio = np.linalg.norm(main, axis=-1, keepdims=True) / (np.linalg.norm(guided, axis=-1, keepdims=True) + 1e-8)
        guided = guided * np.clip(ratio, renorm_min, 1.0)
        return img + img_scale * (guided - img) if img_scale > 1 else guided
    if img_scale > 1:
        guided = img + img_scale * (guided - img)
    if kind == "global":
        ratio = np.sqrt((main**2).sum()) / (np.sqrt((guided**2).sum()) + 1e-8)
    else:
        ratio = np.linalg.norm(main, axis=-1, keepdims=True) / (np.linalg.norm(guided, axis=-1, keepdims=True) + 1e-8)
    return guided * np.clip(ratio, renorm_min, 1.0)


@pytest.mark.parametrize("kind", RENORM_TYPES)
@pytest.mark.parametrize("text_scale", [1.01, 4.0])
@pytest.mark.parametrize("img_scale", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("renorm_min", [0.0, 0.7, 1.0])
def test_guidance_is_official(kind, text_scale, img_scale, renorm_min):
    """Guided images are too strong, too weak, or guided away from the wrong thing."""
    args = text_scale, img_scale, kind, renorm_min
    ours = compiled(*velocities(), guidance(*args))
    np.testing.assert_allclose(ours, official(*velocities(), *args), rtol=1e-4, atol=1e-5)


def test_renorm_types_differ():
    """Two renorm types do the same."""
    results = [np.asarray(compiled(*velocities(), guidance(4.0, 2.0, kind, 0.0))) for kind in RENORM_TYPES]
    for i in range(3):
        assert np.abs(results[i] - results[i - 1]).max() > 1e-2


@pytest.mark.parametrize("kind", RENORM_TYPES)
def test_renorm_never_strengthens(kind):
    """Renormalisation blows up a velocity that guidance has made weaker."""
    main = velocities()[0]
    weaker = compiled(main, 1.2 * main, main, guidance(2.0, 1.0, kind, 0.0))
    np.testing.assert_allclose(weaker, 0.8 * main, rtol=1e-3, atol=1e-4)
    stronger = compiled(main, 0.5 * main, main, guidance(2.0, 1.0, kind, 0.0))
    np.testing.assert_allclose(stronger, main, rtol=1e-3, atol=1e-4)


def test_renorm_min_one_is_no_renorm():
    """`cfg_renorm_min` 1, which the app says disables renormalisation, does not."""
    main, text, img = velocities()
    for kind in RENORM_TYPES:
        by_text = text + 4 * (main - text)
        ours = compiled(main, text, img, guidance(4.0, 2.0, kind, 1.0))
        np.testing.assert_allclose(ours, img + 2 * (by_text - img), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", RENORM_TYPES)
def test_equal_branches_change_nothing(kind):
    """Guidance changes an image although its contexts say nothing else."""
    main = velocities()[0]
    np.testing.assert_allclose(compiled(main, main, main, guidance(4.0, 2.0, kind, 0.0)), main, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", RENORM_TYPES)
def test_velocity_of_zero(kind):
    """A token that does not move turns the image into NaN: its norm is divided by."""
    zero = np.zeros((6, 8), np.float32)
    main, text, img = velocities()
    for branches in ((zero, zero, zero), (zero, text, img), (main, text, zero)):
        assert np.isfinite(compiled(*branches, guidance(4.0, 2.0, kind, 0.0))).all()
    some = main.copy()
    some[2] = 0
    assert np.isfinite(compiled(some, some, some, guidance(4.0, 2.0, kind, 0.0))).all()


def test_branch_without_images_is_not_looked_at():
    """With image guidance off, whatever stands in its branch gets into the image."""
    main, text, img = velocities()
    for kind in RENORM_TYPES:
        for scale in (0.0, 0.5, 1.0):
            g = guidance(4.0, scale, kind, 0.0)
            poisoned = compiled(main, text, np.full_like(img, np.nan), g)
            np.testing.assert_array_equal(poisoned, compiled(main, text, img, g))


def test_branches_are_on_where_guidance_needs_them():
    """A branch that counts is not computed; or one is that does not count, at the price of another evaluation."""
    for text_scale, img_scale, guided, wanted in (
        (4.0, 2.0, True, (True, True)),
        (4.0, 2.0, False, (False, False)),
        (4.0, 1.0, True, (True, False)),
        (1.0, 2.0, True, (False, False)),  # officially nothing is guided without guidance by text
        (0.0, 0.0, True, (False, False)),
    ):
        assert branches_on(settings(text_scale, img_scale), np.bool_(guided)) == wanted


@pytest.mark.parametrize("kind", RENORM_TYPES)
def test_padding_does_not_count(kind):
    """A small image beside a large one is padded, and its norms are taken over the padding too."""
    g = guidance(4.0, 2.0, kind)
    padded = [np.pad(v, ((0, 3), (0, 0))) for v in velocities()]
    np.testing.assert_allclose(compiled(*padded, g)[:6], compiled(*velocities(), g), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", RENORM_TYPES)
def test_regression_13_norms_are_per_request(kind):
    """An image depends on its neighbours in the batch: the norm is taken over all of them."""
    g = guidance(4.0, 2.0, kind, 0.0)
    requests = [velocities(seed=0), [100 * v for v in velocities(seed=1)]]
    batch = [jnp.stack(v) for v in zip(*requests, strict=True)]
    together = jax.jit(jax.vmap(combine))(*batch, jax.tree.map(lambda x: np.stack([x, x]), g))
    for ours, request in zip(together, requests, strict=True):
        np.testing.assert_allclose(ours, compiled(*request, g), rtol=1e-4, atol=1e-5)


def test_scales_compile_nothing():
    """Another scale or renorm type compiles for a minute."""
    compiled(*velocities(), guidance(4.0, 2.0, "global", 0.0))
    before = compiled._cache_size()
    for g in (guidance(3, 1, "channel", 1), guidance(7.5, 0.0, "text_channel", 0.3)):
        compiled(*velocities(), g)
    assert compiled._cache_size() == before
