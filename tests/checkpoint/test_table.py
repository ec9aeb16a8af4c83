"""The name table: what fills which parameter."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter

import checkpoints
import jax.numpy as jnp
import numpy as np
import pytest

from bagel_jax.checkpoint.files import CheckpointFiles
from bagel_jax.checkpoint.load import PublishedCheckpoint
from bagel_jax.checkpoint.sizes import read_config
from bagel_jax.checkpoint.table import CONV, LINEAR, TABLE, Row, Target, resolve
from bagel_jax.errors import InputError
from bagel_jax.models.weights import abstract_weights, flatten


@pytest.fixture(scope="module")
def tiny_shapes(tiny_dir):
    config = read_config(CheckpointFiles(tiny_dir))
    return {path: leaf.shape for path, leaf in flatten(abstract_weights(config, jnp.float32).params).items()}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The published checkpoint's names and shapes, matched to the full-size model."""
    files = CheckpointFiles(checkpoints.write_official(tmp_path_factory.mktemp("official") / "model"))
    checkpoint = PublishedCheckpoint(files, read_config(files))
    shutil.rmtree(files.directory)  # the headers were read, and nothing else is there
    return checkpoint


def test_every_parameter_has_one_row(tiny_shapes):
    """A parameter with no row would keep garbage, one with two rows whichever came last."""
    for path in tiny_shapes:
        assert sum(row.match(path) is not None for row in TABLE) == 1, path


def test_every_row_is_used(tiny_shapes):
    """A row that matches nothing is a parameter that the model has lost."""
    assert [row.target for row in TABLE if not any(row.match(path) for path in tiny_shapes)] == []


def test_full_size_maps_all_official_tensors(official):
    """All 1,223 + 244 published tensors are used, each once and in its own shape; the real download would load."""
    expected = {(kind, n): s for kind in ("ema", "ae") for n, s in checkpoints.official_shapes(kind).items()}
    used = Counter((target.row.file, source) for target in official.targets for source in target.sources)
    assert Counter(kind for kind, _ in used) == {"ema": 1223, "ae": 244}
    assert used.keys() == expected.keys()
    assert set(used.values()) == {1}
    for target in official.targets:
        for source in target.sources:
            assert target.source_shape == expected[target.row.file, source], source
    assert official.report().problems == []


def test_full_size_components(official):
    """The split over components is the one that names and sizes in the published files show."""
    counts = {name: sum(t.size for t in tensors) for name, tensors in official.report().tensors.items()}
    shapes, autoencoder = checkpoints.official_shapes("ema"), checkpoints.official_shapes("ae")

    def size(*words, without=()):
        chosen = [n for n in shapes if any(w in n for w in words) and not any(w in n for w in without)]
        return sum(int(np.prod(shapes[n])) for n in chosen)

    assert counts["generation expert"] == size("_moe_gen")
    assert counts["understanding expert"] == size(".layers.", "model.norm", without=("_moe_gen", "vit_model"))
    assert counts["embedding and head"] == size("embed_tokens", "lm_head")
    assert counts["vit"] == size("vit_model")
    assert counts["autoencoder"] == sum(int(np.prod(shape)) for shape in autoencoder.values())
    assert sum(counts.values()) == size("") + counts["autoencoder"]


def test_row_too_few(tiny_shapes):
    """Forgetting a row is told by the parameter's name, not by a wrong image."""
    table = tuple(row for row in TABLE if row.target != "trunk.layers.gen.gate.kernel")
    with pytest.raises(InputError, match=r"parameter trunk\.layers\.gen\.gate\.kernel has 0 rows"):
        resolve(tiny_shapes, table)


def test_row_too_many(tiny_shapes):
    """Two rows for one parameter are told by its name, even where they reach it through a pattern."""
    with pytest.raises(InputError, match=r"parameter vit\.post_norm\.bias has 2 rows"):
        resolve(tiny_shapes, (*TABLE, Row("vit.post_norm.bias", "other.bias")))
    with pytest.raises(InputError, match=r"parameter autoencoder\.\S+\.kernel has 2 rows"):
        resolve(tiny_shapes, (*TABLE, Row("autoencoder.{path}.kernel", "other.{path}.weight", CONV)))


def test_tensor_used_twice(tiny_shapes):
    """One tensor in two parameters (a copied row, its source not changed) is told by all three names."""
    table = tuple(
        dataclasses.replace(row, source="language_model.model.norm.weight")
        if row.target == "trunk.norm_gen.scale"
        # (the generation expert's final norm, given the understanding expert's)
        else row
        for row in TABLE
    )
    with pytest.raises(InputError, match=r"language_model\.model\.norm\.weight") as error:
        resolve(tiny_shapes, table)
    assert "trunk.norm_gen.scale" in str(error.value)
    assert "trunk.norm.scale" in str(error.value)


def test_same_name_in_both_files(tiny_shapes):
    """A name may stand in both files: the autoencoder's tensors are kept apart from the model's."""
    table = (*TABLE, Row("extra.bias", "encoder.conv_in.bias"))
    targets = resolve({**tiny_shapes, "extra.bias": (32,)}, table)
    found = [t.row.file for t in targets if t.sources == ("encoder.conv_in.bias",)]
    assert sorted(found) == ["ae", "ema"]


def test_match_is_of_the_whole_path():
    """Dots in a target are dots, and a row matches a whole path only."""
    row = Row("vit.norm.scale", "w")
    assert row.match("vit.norm.scale") == "w"
    for path in ("vit.norm.scales", "a.vit.norm.scale", "vitXnorm.scale"):
        assert row.match(path) is None
    assert Row("a.{path}.kernel", "{path}.weight").match("a.b.c.kernel") == "b.c.weight"


def test_stacked_sources_are_in_layer_order():
    """Layer 10 comes after layer 9, not after layer 1."""
    (target,) = resolve({"x.scale": (12, 4)}, (Row("x.scale", "layers.{l}.weight"),))
    assert target.sources == tuple(f"layers.{i}.weight" for i in range(12))
    assert target.source_shape == (4,)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("axes", [None, LINEAR, CONV, (1, 2, 0), (2, 0, 1), (3, 1, 0, 2)])
def test_source_shape_inverts_axes(axes, stacked):
    """The shape asked of a tensor is the one that its axes turn into the parameter's shape."""
    shape = (2, 3, 5, 7)[: len(axes or (0, 1))]
    layers = (4,) if stacked else ()
    row = Row("x", "layers.{l}.y" if stacked else "y", axes)
    source = Target("x", layers + shape, row, ()).source_shape
    assert np.empty(source).transpose(axes or tuple(range(len(source)))).shape == shape


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("shape", "axes", "heads", "joined", "source"),
    [
        ((5, 4, 8), LINEAR, (1, 2), (5, 32), (32, 5)),  # q, k, v
        ((4, 8), None, (0, 1), (32,), (32,)),  # their biases
        ((4, 8, 5), LINEAR, (0, 1), (32, 5), (5, 32)),  # o
    ],
)
def test_heads_are_one_axis_of_the_source(shape, axes, heads, joined, source, stacked):
    """A head's numbers lie side by side in the source; there and back, and in part, every number keeps its place."""
    layers = (3,) if stacked else ()
    row = Row("x", "layers.{l}.y" if stacked else "y", axes, heads=heads)
    target = Target("x", layers + shape, row, ())
    assert target.joined_shape == layers + joined
    assert target.source_shape == source
    tensor = np.arange(np.prod(source)).reshape(source)
    whole = tensor.transpose(axes or (0,)).reshape(shape)
    assert np.array_equal(target.to_target(tensor), whole)
    assert np.shares_memory(target.to_target(tensor), tensor)
    assert np.array_equal(target.to_source(whole), tensor)
    index = [slice(0, size) for size in shape]
    index[heads[0]] = slice(1, 3)  # two of four heads
    part = tensor[target.source_index(tuple(index))]
    assert part.size * 2 == tensor.size
    assert np.array_equal(target.to_target(part), whole[tuple(index)])
    index[heads[1]] = slice(0, 4)
    with pytest.raises(ValueError, match="x is asked for from 0 to 4 of each head's 8 numbers; a head is read whole"):
        target.source_index(tuple(index))


def test_conv_and_linear_shapes():
    """PyTorch's [out, in, height, width] and [out, in] are what is asked for."""
    assert Target("x", (2, 3, 5, 7), Row("x", "y", CONV), ("y",)).source_shape == (7, 5, 2, 3)
    assert Target("x", (5, 7), Row("x", "y", LINEAR), ("y",)).source_shape == (7, 5)
