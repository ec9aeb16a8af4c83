"""Samples into rows: each once, in order, in the first row with room."""

from __future__ import annotations

import grain
import numpy as np
import pytest
from training import MARKERS

from bagel_jax.errors import InputError
from bagel_jax.train.data import FirstFit
from bagel_jax.train.packing import TextPart, lay_out


def number_sample(number: int, length: int):
    """A sample of one text that tells its number."""
    return lay_out([TextPart((number % 700,) * length)], MARKERS, patch_dim=3, latent_dim=2)


PLACES = {"text": 10, "vit": 1, "latent": 1}


class Numbered(grain.transforms.Map):
    """Numbers to samples of many lengths; some do not fit into any row."""

    def map(self, number):
        return number_sample(number, 1 + (7 * number) % 12)


def first_fit(count=300, rows=3):
    return FirstFit(grain.MapDataset.range(count).map(Numbered()).to_iter_dataset(), PLACES, rows)


def numbers(batch) -> list[int]:
    """Samples of a batch, in the order of their numbers."""
    found = set(zip(batch["text_sample"].ravel().tolist(), batch["text"][..., 0].ravel().tolist(), strict=True))
    return sorted(number for sample, number in found if sample > 0)


def test_first_fit_loses_nothing_and_takes_nothing_twice():
    """Samples at the seams of batches are lost or learned twice; long ones stop the run."""
    batches = []
    for batch in first_fit():
        batches.append(numbers(batch))
        assert batch["text"].shape == (3, 10, 7)
    flat = [number for batch in batches for number in batch]
    fitting = [n for n in range(300) if 1 + (7 * n) % 12 <= 10]
    assert len(flat) > 200
    assert flat == fitting[: len(flat)]
    assert len(flat) / len(batches) > 4  # rows hold more than one


def test_first_fit_fills_the_first_row_with_room():
    """Rows stay half empty."""
    lengths = [6, 7, 4, 3, 9]
    samples = grain.MapDataset.source([number_sample(i, n) for i, n in enumerate(lengths)]).repeat().to_iter_dataset()
    batch = next(iter(FirstFit(samples, PLACES, 3)))
    rows = [
        [int(row[np.flatnonzero(s == i)[0], 0]) for i in sorted(set(s[s > 0]))]
        for row, s in zip(batch["text"], batch["text_sample"], strict=True)
    ]
    assert rows == [[0, 2], [1, 3], [4]]
    assert [len(set(s[s > 0].tolist())) for s in batch["text_sample"]] == [2, 2, 1]


def test_nothing_that_fits_is_an_error():
    """A run with too few places in a row hangs without a word."""
    long = grain.MapDataset.source([number_sample(0, 11)]).repeat().to_iter_dataset()
    with pytest.raises(InputError, match="text"):
        next(iter(FirstFit(long, PLACES, 2)))
