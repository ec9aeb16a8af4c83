"""The files of a checkpoint: whole or sharded, damaged, or not what the model needs."""

from __future__ import annotations

import checkpoints
import jax
import numpy as np
import pytest
from checkpoints import FILES, INDEX

from bagel_jax.bagel import Bagel
from bagel_jax.checkpoint.files import CheckpointFiles
from bagel_jax.errors import InputError

EMA, AE = FILES["ema"], FILES["ae"]
NORM = "language_model.model.layers.1.input_layernorm_moe_gen.weight"


@pytest.fixture
def broken(tiny_dir, tmp_path):
    """A copy of tiny-bagel, to be damaged."""
    return checkpoints.copy(tiny_dir, tmp_path / "model")


def refused(directory) -> str:
    """What loading says of a bad checkpoint; that it says so before it loads anything is checked."""
    loaded = []
    with pytest.raises(InputError) as error:
        Bagel.load(directory, progress=lambda *event: loaded.append(event))
    assert loaded == []
    return str(error.value)


def test_sharded_is_equal(tiny, tiny_dir, tmp_path):
    """A sharded download gives the same model, though the layers of one parameter lie in different shards."""
    directory = checkpoints.copy(tiny_dir, tmp_path / "model")
    weight_map = checkpoints.shard(directory)
    assert not (directory / EMA).exists()
    layers = {weight_map[f"language_model.model.layers.{i}.mlp.up_proj.weight"] for i in range(3)}
    assert len(layers) == 2
    ours = Bagel.load(directory, dtype="float32")
    assert ours.config == tiny.config
    leaves, expected = (jax.tree.leaves_with_path(m.load_weights()[0].params) for m in (ours, tiny))
    assert [path for path, _ in leaves] == [path for path, _ in expected]
    for (path, a), (_, b) in zip(leaves, expected, strict=True):
        assert np.array_equal(a, b), path


def test_missing_shard(broken):
    """A download that stopped before the last shard."""
    weight_map = checkpoints.shard(broken)
    shard = weight_map[NORM]
    (broken / shard).unlink()
    assert f"{shard} does not exist" in refused(broken)


def test_tensor_in_two_shards(broken):
    """Which of two would be used is nobody's guess."""
    weight_map = checkpoints.shard(broken)
    other = next(name for name in weight_map.values() if name != weight_map[NORM])
    checkpoints.edit_tensors(broken / other, **{NORM: np.zeros(64, np.float32)})
    message = refused(broken)
    assert f"tensor {NORM} is in both" in message
    assert other in message
    assert weight_map[NORM] in message


def test_tensor_in_another_shard_than_promised(broken):
    """Shards of two downloads mixed: the index belongs to other files."""
    weight_map = checkpoints.shard(broken)
    other = next(name for name in weight_map.values() if name != weight_map[NORM])
    checkpoints.write_index(broken, weight_map | {NORM: other})
    message = refused(broken)
    assert f"tensor {NORM} is in {weight_map[NORM]}" in message
    assert f"says {other}" in message


def test_promised_tensor_that_is_nowhere(broken):
    """The index lists it, no shard has it."""
    weight_map = checkpoints.shard(broken)
    checkpoints.edit_tensors(broken / weight_map[NORM], **{NORM: None})
    assert f"tensor {NORM} is missing" in refused(broken)


@pytest.mark.parametrize("weight_map", [..., None, {}, [], "model.safetensors", {NORM: 3}, {NORM: ["a"]}])
def test_index_without_weight_map(broken, weight_map):
    """An index of another kind is told by its name."""
    checkpoints.shard(broken)
    if weight_map is ...:
        (broken / INDEX).write_text("{}")
    else:
        checkpoints.write_index(broken, weight_map)
    assert INDEX in refused(broken)


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_index_that_is_no_json(broken, content):
    """An index cut short."""
    checkpoints.shard(broken)
    (broken / INDEX).write_text(content)
    assert INDEX in refused(broken)


def test_missing_tensors(broken):
    """Left at zero they would make noise of every image; each is named instead."""
    missing = {
        EMA: (NORM, "language_model.lm_head.weight", "vit_model.vision_model.encoder.layers.2.mlp.fc1.bias"),
        AE: ("decoder.up.1.block.0.nin_shortcut.weight", "encoder.norm_out.bias"),
    }
    for file, names in missing.items():
        checkpoints.edit_tensors(broken / file, **dict.fromkeys(names))
    message = refused(broken)
    assert message.count("tensor ") == 5
    for name in (*missing[EMA], *missing[AE]):
        assert f"tensor {name} is missing" in message


def test_unexpected_tensors(broken):
    """A tensor that nothing reads is a part of the model that would silently not be there."""
    unexpected = {
        EMA: (
            "language_model.model.layers.1.self_attn.o_proj.bias",
            "language_model.model.layers.3.input_layernorm.weight",  # a fourth layer of three
            "encoder.conv_in.weight",  # the autoencoder's, in the model's file
        ),
        AE: ("vae2llm.bias", "encoder.quant_conv.weight"),
    }
    for file, names in unexpected.items():
        checkpoints.edit_tensors(broken / file, **{name: np.zeros(64, np.float32) for name in names})
    message = refused(broken)
    assert message.count("tensor ") == 5
    for name in (*unexpected[EMA], *unexpected[AE]):
        assert f"tensor {name} is unexpected" in message


def test_wrong_shapes(broken):
    """Both shapes are told, in the file's order of axes."""
    wrong = {
        EMA: {
            "language_model.model.layers.2.mlp.up_proj.weight": ((64, 160), [160, 64]),
            "language_model.model.embed_tokens.weight": ((767, 64), [768, 64]),
            "vit_model.vision_model.embeddings.patch_embedding.weight": ((48, 3, 14, 14), [48, 588]),
            "llm2vae.bias": ((1, 64), [64]),
        },
        AE: {
            "decoder.conv_out.weight": ((3, 3, 32, 3), [3, 32, 3, 3]),
            "encoder.mid.attn_1.q.weight": ((64, 64), [64, 64, 1, 1]),
        },
    }
    for file, shapes in wrong.items():
        checkpoints.edit_tensors(broken / file, **{n: np.zeros(shape, np.float32) for n, (shape, _) in shapes.items()})
    message = refused(broken)
    assert message.count("tensor ") == 6
    for name, (shape, needed) in (wrong[EMA] | wrong[AE]).items():
        assert f"tensor {name} has shape {list(shape)}; the model needs {needed}" in message


def test_unreadable_dtype(broken):
    """Whole numbers (a quantised download) are no weights."""
    checkpoints.edit_tensors(broken / EMA, **{NORM: np.zeros(64, np.int64)})
    message = refused(broken)
    assert f"tensor {NORM} has dtype I64" in message
    assert "BF16" in message


def test_many_problems_are_counted(broken):
    """A checkpoint of another model gives one readable line, not hundreds of names."""
    tensors = checkpoints.read_tensors(broken / EMA)
    renamed = [name for name in tensors if ".layers.0.mlp" in name or ".layers.1.mlp" in name]
    checkpoints.write_tensors(broken / EMA, {f"x.{n}" if n in renamed else n: x for n, x in tensors.items()})
    message = refused(broken)
    assert message.count("tensor ") == 10
    assert f"and {2 * len(renamed) - 10} more" in message


@pytest.mark.parametrize("file", [EMA, AE])
@pytest.mark.parametrize("kept", [0, 5, 2000, -1])
def test_truncated_file(broken, file, kept):
    """A download that stopped: nothing at all, within the header, or one byte before the end."""
    data = (broken / file).read_bytes()
    (broken / file).write_bytes(data[:kept])
    message = refused(broken)
    assert f"{broken / file} is not a whole safetensors file" in message
    assert "fetch it again" in message


def test_longer_file(broken):
    """Bytes after the last tensor: two downloads in one file."""
    with (broken / EMA).open("ab") as file:
        file.write(b"x" * 100)
    assert f"{broken / EMA} is not a whole safetensors file" in refused(broken)


def test_text_file(broken):
    """What `git clone` without Git LFS leaves, or an error page."""
    (broken / EMA).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 29214193704\n")
    assert f"{broken / EMA} is not a whole safetensors file" in refused(broken)


def test_truncated_shard(broken):
    """The shard is named, not the index."""
    shard = broken / checkpoints.shard(broken)[NORM]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard} is not a whole safetensors file" in refused(broken)


def test_missing_files(broken, tmp_path):
    """Each is asked for by name; so is the directory."""
    (broken / AE).rename(tmp_path / "ae")
    assert f"{broken / AE} does not exist" in refused(broken)
    (tmp_path / "ae").rename(broken / AE)
    (broken / EMA).unlink()
    message = refused(broken)
    assert EMA in message
    assert INDEX in message
    assert str(tmp_path / "nowhere") in refused(tmp_path / "nowhere")
    assert str(broken / AE) in refused(broken / AE)  # a file, not a directory


def test_directory_in_place_of_a_file(broken):
    """`ae.safetensors/` is what some download tools leave."""
    (broken / AE).unlink()
    (broken / AE).mkdir()
    assert AE in refused(broken)


def test_headers(tiny_dir):
    """Sizes of a dry run come from the headers."""
    files = CheckpointFiles(tiny_dir)
    for kind, file in FILES.items():
        tensors = checkpoints.read_tensors(tiny_dir / file)
        assert files.shapes(kind) == {name: x.shape for name, x in tensors.items()}
        for name, x in tensors.items():
            info = files.tensors[kind][name]
            assert (info.size, info.num_bytes, info.dtype) == (x.size, x.nbytes, "F32")
            assert info.file == tiny_dir / file
