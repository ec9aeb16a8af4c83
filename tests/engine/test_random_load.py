"""Many requests at random times: each gets what it gets alone."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from PIL import Image

from bagel_jax.bagel import Bagel
from bagel_jax.request import Request
from bagel_jax.settings import EngineConfig

SIDES = (64, 128, 256)


def random_request(i: int, random: np.random.RandomState) -> Request:
    """A request of any modality, 64 to 256 pixels a side, 2 to 20 steps (an edit 3 at most), its own settings."""
    modality = ("text2img", "img2img", "img2text", "text2img", "text2text")[random.randint(5)]
    options = {"seed": int(random.randint(1000)), "request_id": str(i)}
    height, width = (int(side) for side in random.choice(SIDES, 2))
    image = None
    if modality.startswith("img"):
        # The resize for edits makes the shorter side 512, so that larger images would be all alike.
        pixels = random.randint(0, 256, (min(height, 160), min(width, 160), 3)).astype(np.uint8)
        image = Image.fromarray(pixels)
    if not modality.endswith("img"):
        return Request.create(modality, f"what is number {i}?", image, max_tokens=random.randint(1, 30), **options)
    options |= {
        "steps": random.randint(2, 21),
        "cfg_text_scale": random.choice([1.0, 2.0, 4.0]),
        "cfg_img_scale": random.choice([1.0, 1.5, 2.0]),
        "cfg_interval": [(0.0, 1.0), (0.4, 1.0), (0.3, 0.9)][random.randint(3)],
        "cfg_renorm_type": ["global", "channel", "text_channel"][random.randint(3)],
        "timestep_shift": random.choice([1.0, 3.0]),
        "taylorseer": bool(random.randint(4) == 0),
    }
    if modality == "img2img":
        options["steps"] = min(options["steps"], 3)  # of 1,024 tokens and three branches
    else:
        options |= {"height": height, "width": width}
        if random.randint(8) == 0:
            options |= {"think": True, "max_think_tokens": 20}
    return Request.create(modality, f"a bench, number {i}", image, **options)


@pytest.mark.slow
def test_random_load(tiny_dir):
    """REGRESSIONS 1, 3, 13, 25, 32, 34: metadata crosses, or a result depends on who else is there."""
    random = np.random.RandomState(0)
    requests = [random_request(i, random) for i in range(24)]
    model = Bagel.load(tiny_dir, settings=EngineConfig(num_pages=400, ar_max_num_seqs=8, dit_max_num_seqs=3))
    handles, finished = [], []
    for request in requests:
        handles.append(model.submit(request))
        handles[-1]._future.add_done_callback(lambda _, i=request.request_id: finished.append(i))
        time.sleep(random.exponential(0.05))
    results = [handle.result() for handle in handles]
    assert finished != [request.request_id for request in requests]  # not first in, first out
    assert any(result.latents is not None for result in results)
    for request, ours in zip(requests, results, strict=True):
        theirs = model.run(dataclasses.replace(request, request_id=f"{request.request_id} alone"))
        assert ours.text == theirs.text
        assert (ours.latents is None) == (theirs.latents is None) == (not request.makes_image)
        if request.makes_image:
            assert ours.image.size == theirs.image.size
            error = np.linalg.norm(ours.latents - theirs.latents) / np.linalg.norm(theirs.latents)
            assert error < 1e-4, request
