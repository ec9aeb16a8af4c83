"""Requests of all kinds for tests of the engine, and what must hold when they are gone."""

from __future__ import annotations

import time

import numpy as np
from small import random_image

from bagel_jax.engine.kv.store import KVStore
from bagel_jax.request import Request


def empty(made) -> None:
    """Nothing is held by a request that is gone: no page, no slot, no thread."""
    driver = made.engine
    wait_for_threads(made)
    engine = driver.engine
    assert not driver._handles
    assert not driver._commands
    assert not engine.tickets
    assert not engine.offers
    assert not engine.context.busy
    assert not engine.context.finished
    assert not engine.denoise.busy
    engine.check()
    for store in stores(engine):
        store.prefixes.clear()
        assert store.pool.num_free == store.pool.num_pages


def wait_for_threads(made) -> None:
    """Returns when an engine's threads have ended, which they do when nothing is in work."""
    until = time.monotonic() + 60
    while made.engine._threads:
        assert time.monotonic() < until
        time.sleep(0.005)


def stores(engine) -> list[KVStore]:
    """An engine's stores, each once."""
    return list(dict.fromkeys((engine.context.store, engine.denoise.store)))


def mixed(count: int, seed: int = 0) -> list[Request]:
    """Requests of all modalities, sizes, steps and settings."""
    random = np.random.RandomState(seed)
    made = []
    for i in range(count):
        modality = ("text2img", "img2img", "img2text", "text2img", "text2text", "img2img")[i % 6]
        options = {"seed": i, "request_id": f"{modality} {i}"}
        image = random_image(i, *random.randint(20, 80, 2)) if modality.startswith("img") else None
        if modality.endswith("img"):
            options |= {
                "steps": random.randint(2, 9),
                "cfg_text_scale": random.choice([1.0, 3.0, 5.0]),
                "cfg_img_scale": random.choice([1.0, 2.0]),
                "cfg_interval": [(0.0, 1.0), (0.4, 1.0), (0.2, 0.8)][random.randint(3)],
                "cfg_renorm_type": ["global", "channel", "text_channel"][random.randint(3)],
                "timestep_shift": random.choice([1.0, 3.0]),
                "taylorseer": bool(i % 4 == 3),
                "taylorseer_first": 2,
            }
            if modality == "text2img":
                options |= {"height": 4 * random.randint(2, 9), "width": 4 * random.randint(2, 9)}
                options |= {"think": True, "max_think_tokens": 6} if i % 9 == 0 else {}
        else:
            options["max_tokens"] = random.randint(1, 12)
        made.append(Request.create(modality, f"a bench number {i}", image, **options))
    return made


def same(ours, theirs) -> None:
    """Two results of one request, up to rounding."""
    assert ours.request_id == theirs.request_id
    assert ours.text == theirs.text
    assert (ours.image is None) == (theirs.image is None)
    if ours.image is not None:
        assert ours.image.size == theirs.image.size
        np.testing.assert_allclose(ours.latents, theirs.latents, rtol=1e-4, atol=1e-4)
