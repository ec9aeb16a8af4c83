"""Run in a process of its own with devices that a CPU pretends to have: golden cases and loads on meshes of them.

`python tests/meshes.py JOB` prints a line of JSON for each part of the job, as soon as it is done. A job is
`{"golden": [[settings, [case, ...]], ...], "loads": [settings, ...], "heads": [settings, ...], "vit": [[data, sequence,
tensor], ...]}`, each part optional: golden cases on the small checkpoint; a random load on the toy model, whose results
are compared with those of one device; the same of a toy model with three KV heads; one image through the ViT.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import small
from golden import GENERATION, Case, relative_error
from mixed_load import empty, mixed, wait_for_threads
from test_compilations import compilations

from bagel_jax.bagel import Bagel
from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.config import BagelConfig
from bagel_jax.engine.context import steps
from bagel_jax.models import weights as models
from bagel_jax.placement.placement import Placement
from bagel_jax.settings import EngineConfig

models.abstract_weights = functools.cache(models.abstract_weights)  # as in conftest.py
DATA = Path(__file__).parent / "data"
LOAD = 7  # requests: one of each kind, and an edit more


def golden(settings: dict, names: list[str]) -> dict:
    """How far results are from the official ones, and what a second request compiles."""
    model = Bagel.load(DATA / "tiny-bagel", dtype="float32", settings=EngineConfig(**settings))
    told = {"settings": settings, "errors": {}, "texts": {}}
    for name in names:
        case = Case.read(DATA / "cases", name)
        result = model.run(case.request())
        if case.texts:
            told["texts"][name] = result.text == case.texts[0]
        if name in GENERATION or name == "text2img_taylorseer":
            told["errors"][name] = relative_error(result.latents, case.arrays["final_latent"])
            told["pixels"] = int(np.abs(np.asarray(result.image).astype(int) - case.image).max())
    with compilations() as compiled:
        model.run(Case.read(DATA / "cases", names[-1]).request())
    told |= {"compiled": compiled, "meshes": [dict(place.mesh.shape) for place in model.placements]}
    told["devices"] = [sorted(d.id for d in place.mesh.devices.flat) for place in model.placements]
    core = model.engine.engine
    told["page_share"] = [
        stage.store.pages.nbytes // stage.store.pages.addressable_shards[0].data.nbytes
        for stage in (core.context, core.denoise)
    ]
    told["weight_share"] = [_share(weights.params) for weights in model.load_weights()]
    wait_for_threads(model)
    core.check()
    model.close()
    return told


def _share(params) -> float:
    """Which part of the trunk's kernels a device has."""
    kernels = [x for path, x in models.flatten(params).items() if path.startswith("trunk.layers") and "kernel" in path]
    return sum(x.addressable_shards[0].data.nbytes for x in kernels) / sum(x.nbytes for x in kernels)


def outcomes(model: Bagel, count: int) -> dict:
    """What a random load comes to."""
    found = {request.request_id: result for request, result in model.run_many(mixed(count, seed=3))}
    empty(model)
    model.close()
    return found


def difference(results: dict, expected: dict) -> float:
    """The largest relative difference of latents; 1 where a text is another."""
    worst = 0.0
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert not isinstance(result, Exception), (name, result)
        if result.latents is None:
            worst = max(worst, float(result.text != expected[name].text))
        else:
            worst = max(worst, relative_error(result.latents, expected[name].latents))
    return worst


def loads(config: BagelConfig, settings: list[dict]) -> None:
    """Tells of a random load on meshes, how far its results are from those of one device."""
    expected = outcomes(small.new_model(config), LOAD)
    for one in settings:
        results = outcomes(small.new_model(config, **one), LOAD)
        print(json.dumps({"settings": one, "difference": difference(results, expected)}), flush=True)


def vit(shapes: list[list[int]]) -> None:
    """Tells of meshes which part of one device's operations each device has of an image, and another result's error."""
    source = ModelSource.open(DATA / "tiny-bagel")
    patches = np.random.RandomState(0).standard_normal((240, 588)).astype(np.float32)
    found = []
    for shape in ([1, 1, 1], *shapes):
        place = Placement.over(jax.devices()[: np.prod(shape)], source.config.trunk.num_kv_heads, *shape)
        weights = source.load(np.float32, sharding=place.parameter)
        image = place.put((patches, np.arange(240, dtype=np.int32), np.int32(230)))
        program = steps.embed_vit.lower(weights.skeleton, weights.arrays, *image, place.spread).compile()
        out = np.asarray(steps.embed_vit(weights.skeleton, weights.arrays, *image, place.spread))[:230]
        found.append((program.cost_analysis()["flops"], out))
        if len(found) > 1:
            share, error = found[-1][0] / found[0][0], relative_error(out, found[0][1])
            print(json.dumps({"shape": shape, "share": share, "error": error}), flush=True)


def main(job: dict) -> None:
    """Does a job."""
    for settings, names in job.get("golden", ()):
        print(json.dumps(golden(settings, names)), flush=True)
        jax.clear_caches()
    if "loads" in job:
        loads(small.CONFIG, job["loads"])
    if "vit" in job:
        vit(job["vit"])
    if "heads" in job:
        trunk = dataclasses.replace(small.CONFIG.trunk, num_heads=6, num_kv_heads=3)
        loads(dataclasses.replace(small.CONFIG, trunk=trunk), job["heads"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
