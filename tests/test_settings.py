"""Settings of the stages, and which attention is chosen."""

from __future__ import annotations

import numpy as np
import pytest

from bagel_jax import settings
from bagel_jax.errors import InputError
from bagel_jax.settings import ATTENTION_VARIABLE, EngineConfig, attention_backend


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ar_max_num_seqs": 0}, "ar_max_num_seqs is 0"),
        ({"max_num_batched_tokens": 8}, "max_num_batched_tokens is 8"),
        ({"page_size": 48}, "page_size is 48.*16, 32, 64, 128"),
        ({"num_pages": 1}, "num_pages is 1"),
        ({"num_pages": 2.5}, "num_pages is 2.5"),
        ({"prefix_cache": "no"}, "prefix_cache is 'no'"),
        ({"dit_max_num_seqs": 0}, "dit_max_num_seqs is 0"),
        ({"vae_tiling": 1}, "vae_tiling is 1"),
        ({"topology": "three-stage"}, "topology is 'three-stage'.*two-stage, single-stage"),
        ({"ar_device": -1}, "ar_device is -1"),
        ({"dit_device": "gpu"}, "dit_device is 'gpu'"),
        ({"attention": "flash"}, "attention is 'flash'.*auto, reference, xla, pallas"),
        ({"precompile": "512"}, "precompile is '512'.*all, or sizes"),
        ({"precompile": "512x512,"}, "precompile is '512x512,'"),
        ({"precompile": "0x16"}, "precompile is '0x16'"),
        ({"precompile": "-16x16"}, "precompile is '-16x16'"),
        ({"precompile": None}, "precompile is None; it must be a text"),
        ({"ar_max_num_seqs": 64, "max_num_batched_tokens": 32}, "max_num_batched_tokens is 32.*ar_max_num_seqs, 64"),
    ],
)
def test_bad_settings(wrong, message):
    """A pool of no pages, or a page size that no kernel knows, would fail in the middle of a run."""
    with pytest.raises(InputError, match=message):
        EngineConfig(**wrong)


def test_sizes_to_precompile():
    """Programs would be compiled for images on their side, or twice."""
    assert EngineConfig().precompile_sizes is None
    assert EngineConfig(precompile="all").precompile_sizes == "all"
    sizes = EngineConfig(precompile="1024x768, 512x512,512x512").precompile_sizes
    assert sizes == ((768, 1024), (512, 512))  # height first


def test_frozen():
    """A value changed after validation is used unvalidated."""
    with pytest.raises(AttributeError):
        EngineConfig().page_size = 48
    with pytest.raises(TypeError):
        EngineConfig(pages=3)


def test_numbers_of_numpy():
    """A number of NumPy's would be refused, or end up where JSON is written."""
    config = EngineConfig(page_size=np.int64(32), dit_max_num_seqs=np.int32(3))
    assert (type(config.page_size), type(config.dit_max_num_seqs)) == (int, int)


def test_the_old_name():
    """A script for the last version would end in an ImportError."""
    with pytest.warns(DeprecationWarning, match="ServingSettings is called EngineConfig now"):
        assert settings.ServingSettings is EngineConfig
    with pytest.raises(AttributeError):
        _ = settings.Serving


def test_choice_of_attention(monkeypatch):
    """A CPU gets an interpreted kernel, or a TPU the slow path, or the variable beats the argument."""
    monkeypatch.delenv(ATTENTION_VARIABLE, raising=False)
    assert [attention_backend("auto", p) for p in ("cpu", "gpu", "tpu")] == ["xla", "gpu", "tpu"]
    assert [attention_backend("pallas", p) for p in ("cpu", "gpu", "tpu")] == ["tpu-interpret", "gpu", "tpu"]
    assert attention_backend("reference", "tpu") == "reference"
    assert EngineConfig().attention == "auto"
    monkeypatch.setenv(ATTENTION_VARIABLE, "reference")
    assert EngineConfig().attention == "reference"
    assert EngineConfig(attention="xla").attention == "xla"
    monkeypatch.setenv(ATTENTION_VARIABLE, "cudnn")
    with pytest.raises(InputError, match=r"BAGEL_JAX_ATTENTION is 'cudnn'.*auto, reference, xla, pallas"):
        EngineConfig()
    assert EngineConfig(attention="xla").attention == "xla"
