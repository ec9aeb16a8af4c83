"""Plain XLA, which is what a CPU runs and what kernels are measured against, on any ragged batch."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pallas.backends import check
from pallas.ragged_batches import draw, draw_decode

from bagel_jax.pallas.paged_attention.api import paged_decode

SIZES = [
    {"heads": 4, "kv_heads": 2, "width": 16, "page": 16},
    {"heads": 7, "kv_heads": 1, "width": 64, "page": 64},
    {"heads": 14, "kv_heads": 2, "width": 128, "page": 32},
    {"heads": 2, "kv_heads": 2, "width": 32, "page": 128},
]
CASES = [
    pytest.param(sizes, dtype, marks=[pytest.mark.slow] * (i > 1 or dtype == "bfloat16"))
    for i, sizes in enumerate(SIZES)
    for dtype in ("float32", "bfloat16")
]
SEQUENCES, LONGEST = 4, 140
# On and beside the borders of pages more often than chance has it.
length = st.integers(0, LONGEST) | st.sampled_from([0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129])
lengths = st.lists(length, min_size=SEQUENCES, max_size=SEQUENCES)
seeds = st.integers(0, 2**32 - 1)


def same_shapes(page):
    """So that one program is for all."""
    pages = -(-LONGEST // page)
    return {"num_pages": SEQUENCES * pages + 3, "table_width": pages + 2}


@pytest.mark.parametrize(("sizes", "dtype"), CASES)
@settings(deadline=None, max_examples=20)
@given(seed=seeds, lengths=lengths, data=st.data())
def test_ragged(sizes, dtype, seed, lengths, data):
    """A batch that nobody thought of would come out wrong."""
    queries = [data.draw(st.integers(0, min(n, 30)) | st.just(min(n, 30))) for n in lengths]
    padding = 30 * SEQUENCES + 1 - sum(queries)
    batch = draw(seed, lengths, queries, padding=padding, dtype=dtype, **sizes, **same_shapes(sizes["page"]))
    check("xla", batch, dtype)


@pytest.mark.parametrize(("sizes", "dtype"), CASES)
@settings(deadline=None, max_examples=20)
@given(seed=seeds, lengths=lengths)
def test_decode(sizes, dtype, seed, lengths):
    """The same for one query a sequence."""
    batch = draw_decode(seed, lengths, dtype=dtype, **sizes, **same_shapes(sizes["page"]))
    check("xla", batch, dtype, paged_decode)
