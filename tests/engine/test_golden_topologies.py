"""Golden cases through the engine: either topology, TaylorSeer included."""

from __future__ import annotations

import numpy as np
import pytest
from golden import Case, relative_error

from bagel_jax.bagel import Bagel
from bagel_jax.settings import TOPOLOGIES, EngineConfig


@pytest.fixture(scope="module", params=TOPOLOGIES)
def model(request, tiny_dir):
    return Bagel.load(tiny_dir, settings=EngineConfig(topology=request.param, num_pages=600))


@pytest.mark.parametrize("name", ["text2img", "text2img_taylorseer", "text2img_think"])
def test_images(model, cases_dir, name):
    """The engine, one of its topologies, or TaylorSeer changes an image."""
    case = Case.read(cases_dir, name)
    result = model.run(case.request())
    assert relative_error(result.latents, case.arrays["final_latent"]) < 1e-4
    assert np.abs(np.asarray(result.image, np.int32) - case.image).max() <= 1
    assert [result.text] == (case.texts or [None])


@pytest.mark.parametrize("name", ["text2text", "img2text"])
def test_texts(model, cases_dir, name):
    """The engine or one of its topologies changes an answer."""
    case = Case.read(cases_dir, name)
    assert [model.run(case.request()).text] == case.texts


def test_taylorseer_in_bfloat16(tiny_dir, cases_dir):
    """Forecasts lose more digits in bfloat16 than the official code's (golden README: 9.1e-3)."""
    case = Case.read(cases_dir, "text2img_taylorseer")
    result = Bagel.load(tiny_dir, "bfloat16").run(case.request())
    assert relative_error(result.latents, case.arrays["final_latent"]) < 1.2 * 9.1e-3


def test_forecasting_is_not_computing(model, cases_dir):
    """The golden case would pass with TaylorSeer ignored."""
    case = Case.read(cases_dir, "text2img_taylorseer")
    result = model.run(case.request(taylorseer=False))
    assert relative_error(result.latents, case.arrays["final_latent"]) > 1e-3
