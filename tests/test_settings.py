"""Settings of the stages, and which attention is chosen."""

from __future__ import annotations

import pytest

from bagel_jax.errors import InputError
from bagel_jax.settings import ATTENTION_VARIABLE, ServingSettings, attention_backend


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
        ({"ar_max_num_seqs": 64, "max_num_batched_tokens": 32}, "max_num_batched_tokens is 32.*ar_max_num_seqs, 64"),
    ],
)
def test_bad_settings(wrong, message):
    """A pool of no pages, or a page size that no kernel knows, would fail in the middle of a run."""
    with pytest.raises(InputError, match=message):
        ServingSettings(**wrong)


def test_choice_of_attention(monkeypatch):
    """A CPU gets an interpreted kernel, or a TPU the slow path, or the variable beats the argument."""
    monkeypatch.delenv(ATTENTION_VARIABLE, raising=False)
    assert [attention_backend("auto", p) for p in ("cpu", "gpu", "tpu")] == ["xla", "gpu", "tpu"]
    assert [attention_backend("pallas", p) for p in ("cpu", "gpu", "tpu")] == ["tpu-interpret", "gpu", "tpu"]
    assert attention_backend("reference", "tpu") == "reference"
    assert ServingSettings().attention == "auto"
    monkeypatch.setenv(ATTENTION_VARIABLE, "reference")
    assert ServingSettings().attention == "reference"
    assert ServingSettings(attention="xla").attention == "xla"
    monkeypatch.setenv(ATTENTION_VARIABLE, "cudnn")
    with pytest.raises(InputError, match=r"BAGEL_JAX_ATTENTION is 'cudnn'.*auto, reference, xla, pallas"):
        ServingSettings()
    assert ServingSettings(attention="xla").attention == "xla"
