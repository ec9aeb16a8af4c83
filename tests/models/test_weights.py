"""A model's layers taken apart for serving."""

from __future__ import annotations

import gc

import jax
import numpy as np
import pytest
import small
from small import CONFIG

from bagel_jax.models.weights import Weights, flatten


@pytest.fixture
def large_enough(monkeypatch) -> None:
    """Any model is one whose layers are faster apart."""
    monkeypatch.setattr(Weights, "better_unrolled", property(lambda self: True))


def test_layers_apart_are_the_same(large_enough):
    """Memory of a deleted array is given to the next one while layers are read from it."""
    weights = small.weights.__wrapped__()  # not the one that all tests share
    expected = {path: np.array(x) for path, x in flatten(weights.params).items()}
    stacked = [x for path, x in flatten(weights.params).items() if path.startswith("trunk.layers")]
    apart = flatten(weights.for_serving(CONFIG, np.float32).params)
    assert all(x.is_deleted() for x in stacked)
    sizes = [x.shape for x in stacked]
    del weights, stacked
    gc.collect()
    others = [jax.block_until_ready(jax.numpy.full(shape, 7.0)) for shape in sizes for _ in range(3)]
    for path, x in apart.items():
        parts = path.split(".")
        if path.startswith("trunk.layers"):
            whole = expected[".".join(parts[:2] + parts[3:])][int(parts[2])]
        else:
            whole = expected[path]
        np.testing.assert_array_equal(x, whole)
    del others


def test_layers_apart_take_no_memory(large_enough):
    """A host would have the largest parameter twice, and pieces that nobody can use."""
    weights = small.weights.__wrapped__()  # not the one that all tests share
    (name,) = (path for path in flatten(weights.params) if path.endswith("layers.und.down.kernel"))
    array = flatten(weights.params)[name]
    start, end = array.unsafe_buffer_pointer(), array.unsafe_buffer_pointer() + array.nbytes
    apart = flatten(weights.for_serving(CONFIG, np.float32).params)
    found = [x.unsafe_buffer_pointer() for path, x in apart.items() if path.endswith("und.down.kernel")]
    assert len(found) == CONFIG.trunk.num_layers
    assert all(start <= pointer < end for pointer in found)
