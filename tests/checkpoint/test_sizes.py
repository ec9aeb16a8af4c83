"""Sizes of a model: from the json files where they can be believed, from the tensors where not."""

from __future__ import annotations

import dataclasses
import json
import shutil

import checkpoints
import pytest

from bagel_jax.checkpoint.files import CheckpointFiles
from bagel_jax.checkpoint.load import PublishedCheckpoint
from bagel_jax.checkpoint.sizes import read_config
from bagel_jax.errors import InputError
from bagel_jax.inputs.images import resized_size


def config_of(directory):
    return read_config(CheckpointFiles(directory))


@pytest.fixture(scope="module")
def tiny_shapes(tiny_dir):
    return {
        kind: {name: x.shape for name, x in checkpoints.read_tensors(tiny_dir / file).items()}
        for kind, file in checkpoints.FILES.items()
    }


@pytest.fixture
def header_dir(tiny_dir, tiny_shapes, tmp_path):
    """Writes tiny-bagel without values; `ema` are other shapes (None: no such tensor), `ae` replaces the whole file."""

    def write(ema=None, ae=None):
        directory = tmp_path / "headers"
        directory.mkdir()
        shapes = tiny_shapes["ema"] | (ema or {})
        shapes = {name: shape for name, shape in shapes.items() if shape is not None}
        checkpoints.write_holes(directory / checkpoints.FILES["ema"], shapes)
        checkpoints.write_holes(directory / checkpoints.FILES["ae"], ae or tiny_shapes["ae"])
        for name in ("config.json", "llm_config.json", "vit_config.json"):
            shutil.copyfile(tiny_dir / name, directory / name)
        return directory

    return write


def test_max_latent_size_of_config_json_is_not_trusted(tiny_dir, header_dir):
    """REGRESSION 26: config.json says 32, the table has 64 x 64 rows; believing it makes 1024² images fail."""
    assert json.loads((tiny_dir / "config.json").read_text())["max_latent_size"] == 32
    assert config_of(tiny_dir).max_latent_size == 64
    smaller = config_of(header_dir({"latent_pos_embed.pos_embed": (36, 64), "vit_pos_embed.pos_embed": (25, 64)}))
    assert (smaller.max_latent_size, smaller.max_vit_patches) == (6, 5)
    assert smaller.max_image_size == 6 * 16


def test_null_means_the_default(header_dir):
    """Hugging Face writes null for a field that has its default, and such a config would be refused."""
    path = header_dir() / "llm_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"head_dim": None, "rope_scaling": None}))
    assert config_of(path.parent).trunk.head_dim == 16


def test_vit_tables_of_different_sizes(header_dir):
    """Patches beyond the smaller table would silently get its last row."""
    table = "vit_model.vision_model.embeddings.position_embedding.weight"
    with pytest.raises(InputError, match=r"position table has 4899 rows, but vit_pos_embed\.pos_embed 4900"):
        config_of(header_dir({table: (4899, 48)}))


def test_input_images_fit_the_position_table(header_dir):
    """Rounded to 16 pixels, an image could be larger than the table, and its last patches would be misplaced."""
    config = config_of(header_dir({"latent_pos_embed.pos_embed": (121, 64)}))
    small = dataclasses.replace(config, autoencoder=dataclasses.replace(config.autoencoder, widths=(32, 64, 64)))
    assert small.max_image_size == 88
    for size in ((100, 100), (90, 300), (300, 90), (2000, 40)):
        assert max(resized_size(*size, small.vae_transform)) <= 88


def test_vit_config_counts_one_layer_too_many(tiny_dir, header_dir):
    """vit_config.json of the published model says 27 where 26 are; the tensors decide."""
    assert json.loads((tiny_dir / "vit_config.json").read_text())["num_hidden_layers"] == 4
    assert config_of(tiny_dir).vit.num_layers == 3
    directory = header_dir()
    checkpoints.edit_json(directory / "vit_config.json", num_hidden_layers=3)
    assert config_of(directory).vit.num_layers == 3


@pytest.mark.parametrize("stated", [2, 5])
def test_vit_layer_count_that_cannot_be(header_dir, stated):
    """A ViT cut short by a bad download must not pass for a smaller one."""
    directory = header_dir()
    checkpoints.edit_json(directory / "vit_config.json", num_hidden_layers=stated)
    with pytest.raises(InputError, match=rf"3 ViT layers.*vit_config\.json says {stated}"):
        config_of(directory)


def test_full_size(tmp_path):
    """Every number of the published model."""
    config = config_of(checkpoints.write_official(tmp_path / "model"))
    shutil.rmtree(tmp_path / "model")
    trunk, vit, autoencoder = config.trunk, config.vit, config.autoencoder
    assert (trunk.num_layers, trunk.hidden_size, trunk.num_heads, trunk.num_kv_heads) == (28, 3584, 28, 4)
    assert (trunk.head_dim, trunk.mlp_width, trunk.vocab_size) == (128, 18944, 152064)
    assert (trunk.rope_theta, trunk.norm_eps, trunk.activation) == (1e6, 1e-6, "silu")
    assert (vit.num_layers, vit.hidden_size, vit.num_heads, vit.mlp_width) == (26, 1152, 16, 4304)
    assert (vit.patch_size, vit.num_positions, vit.channels) == (14, 4900, 3)
    assert (vit.norm_eps, vit.activation) == (1e-6, "gelu_pytorch_tanh")
    assert (autoencoder.base_width, autoencoder.widths) == (128, (128, 256, 512, 512))
    assert (autoencoder.num_res_blocks, autoencoder.latent_channels) == (2, 16)
    assert (autoencoder.scale_factor, autoencoder.shift_factor) == (0.3611, 0.1159)
    assert (config.max_latent_size, config.max_vit_patches, config.latent_patch_size) == (64, 70, 2)
    assert (config.latent_dim, config.token_pixels, config.max_image_size) == (64, 16, 1024)
    assert (config.time_frequencies, config.connector_activation) == (256, "gelu_pytorch_tanh")
    assert not config.interpolate_positions


@pytest.mark.parametrize(
    ("base", "widths", "blocks", "channels", "patch"),
    [
        (32, (32, 64, 96), 1, 8, 2),
        (64, (32, 128), 2, 4, 4),
        (32, (64, 32, 32, 96), 3, 16, 1),
        (64, (64, 64, 64), 0, 8, 2),  # the encoder has no block that would tell its levels
    ],
)
def test_autoencoder_sizes_from_tensors(header_dir, base, widths, blocks, channels, patch):
    """No file states the autoencoder's sizes; another one than FLUX's is built as its tensors are."""
    dim = channels * patch**2
    latents = {"vae2llm.weight": (64, dim), "llm2vae.weight": (dim, 64), "llm2vae.bias": (dim,)}
    directory = header_dir(latents, checkpoints.autoencoder_shapes(base, widths, blocks, channels))
    files = CheckpointFiles(directory)
    config = read_config(files)
    found = config.autoencoder
    assert (found.base_width, found.widths, found.num_res_blocks) == (base, widths, blocks)
    assert (found.latent_channels, found.image_channels) == (channels, 3)
    assert (config.latent_patch_size, config.latent_dim) == (patch, dim)
    assert config.token_pixels == 2 ** (len(widths) - 1) * patch
    assert PublishedCheckpoint(files, config).report().problems == []


@pytest.mark.parametrize("name", ["latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"])
def test_position_table_that_is_no_square(header_dir, name):
    """A table of 1,000 rows belongs to no square grid: every position after the first row would be wrong."""
    with pytest.raises(InputError, match=rf"{name}.*1000.*square"):
        config_of(header_dir({name: (1000, 64)}))


def test_latent_width_that_fits_no_patch(header_dir):
    """48 numbers a token are three latent cells of 16 channels; no square patch has three."""
    with pytest.raises(InputError, match=r"vae2llm\.weight.*square"):
        config_of(header_dir({"vae2llm.weight": (64, 48)}))


@pytest.mark.parametrize(
    "name",
    [
        "latent_pos_embed.pos_embed",
        "vit_pos_embed.pos_embed",
        "vae2llm.weight",
        "time_embedder.mlp.0.weight",
        "vit_model.vision_model.embeddings.position_embedding.weight",
    ],
)
def test_missing_tensor_that_tells_a_size(header_dir, name):
    """Named, with the reason, rather than a KeyError."""
    with pytest.raises(InputError, match=f"tensor {name} is missing"):
        config_of(header_dir({name: None}))


@pytest.mark.parametrize(
    "name", ["encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.up.1.block.0.conv1.weight"]
)
def test_missing_autoencoder_tensor_that_tells_a_size(header_dir, name):
    """The same for the autoencoder."""
    shapes = checkpoints.autoencoder_shapes(32, (32, 32, 64, 64), 1, 16)
    del shapes[name]
    with pytest.raises(InputError, match=f"tensor {name} is missing"):
        config_of(header_dir(ae=shapes))


def test_tensor_with_another_number_of_axes(header_dir):
    """A three-axis position table is told as that."""
    with pytest.raises(InputError, match=r"latent_pos_embed\.pos_embed has shape \[1, 4096, 64\].*2 axes"):
        config_of(header_dir({"latent_pos_embed.pos_embed": (1, 4096, 64)}))


def test_autoencoder_width_that_cannot_be_normed(header_dir):
    """Group norm has 32 groups; a width of 48 is told as bad input, not as Flax's error."""
    directory = header_dir(ae=checkpoints.autoencoder_shapes(32, (32, 48, 64, 64), 1, 16))
    files = CheckpointFiles(directory)
    with pytest.raises(InputError, match="48"):
        PublishedCheckpoint(files, read_config(files))


REQUIRED = {
    "llm_config.json": (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    ),
    "vit_config.json": (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "patch_size",
    ),
}
FIELDS = [(file, field) for file, fields in REQUIRED.items() for field in fields]


@pytest.mark.parametrize(("file", "field"), FIELDS)
@pytest.mark.parametrize("value", [..., None])
def test_field_missing(tiny_dir, header_dir, file, field, value):
    """A json file that is silent would stop a model whose tensors tell the size; where they don't, it is named."""
    directory = header_dir()
    checkpoints.edit_json(directory / file, **{field: value})
    if (file, field) == ("vit_config.json", "num_attention_heads"):
        with pytest.raises(InputError, match=rf"{file} has no {field}"):
            config_of(directory)
    else:
        assert config_of(directory) == config_of(tiny_dir)


def test_llm_config_without_sizes(tiny_dir, header_dir):
    """With nothing but tensors to go by, head counts would be taken for one another."""
    directory = header_dir()
    names = (*REQUIRED["llm_config.json"], "num_key_value_heads")
    checkpoints.edit_json(directory / "llm_config.json", **dict.fromkeys(names, ...))
    assert config_of(directory) == config_of(tiny_dir)


def test_damaged_norm_is_named(header_dir):
    """A tensor of the wrong shape would be taken for the model's size, and all the others be blamed."""
    files = CheckpointFiles(header_dir({"language_model.model.layers.0.self_attn.q_norm.weight": (12,)}))
    problems = PublishedCheckpoint(files, read_config(files)).report().problems
    assert problems == [
        "tensor language_model.model.layers.0.self_attn.q_norm.weight has shape [12]; the model needs [16]"
    ]


def test_rope_theta_of_newer_transformers(tiny_dir, header_dir):
    """transformers 5 writes rope_theta into an object of its own; unread, every text would be another."""
    directory = header_dir()
    parameters = {"rope_theta": 1000000.0, "rope_type": "default"}
    checkpoints.edit_json(directory / "llm_config.json", rope_theta=..., rope_parameters=parameters)
    assert config_of(directory) == config_of(tiny_dir)
    checkpoints.edit_json(directory / "llm_config.json", rope_parameters=parameters | {"rope_type": "yarn"})
    with pytest.raises(InputError, match="rope_parameters of type 'yarn'"):
        config_of(directory)


def test_json_that_cannot_be_read(header_dir):
    """A folder where a file should be would be a traceback."""
    directory = header_dir()
    (directory / "llm_config.json").unlink()
    (directory / "llm_config.json").mkdir()
    with pytest.raises(InputError, match=r"llm_config\.json cannot be read"):
        config_of(directory)


@pytest.mark.parametrize(("file", "field"), FIELDS)
@pytest.mark.parametrize("value", ["64", 64.5, True, 0, -1, [64]])
def test_count_that_is_none(header_dir, file, field, value):
    """A count that is text, broken, or nothing: file, field and value are named."""
    directory = header_dir()
    checkpoints.edit_json(directory / file, **{field: value})
    with pytest.raises(InputError) as error:
        config_of(directory)
    assert f"{file} has {field} = {value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("file", "field", "value", "told"),
    [
        ("llm_config.json", "rope_theta", "1e6", "rope_theta = '1e6'"),
        ("llm_config.json", "rope_theta", -1.0, "rope_theta = -1.0"),
        ("llm_config.json", "rms_norm_eps", [1e-6], "rms_norm_eps = "),
        ("llm_config.json", "rms_norm_eps", -1e-6, "rms_norm_eps = -1e-06"),
        ("llm_config.json", "hidden_act", "mish", "hidden_act = 'mish'"),
        ("llm_config.json", "num_key_value_heads", 3, "4 attention heads on 3 key-value heads"),
        ("llm_config.json", "head_dim", 15, "head width of 15"),
        ("llm_config.json", "rope_scaling", {"type": "yarn", "factor": 4.0}, "rope_scaling"),
        ("vit_config.json", "hidden_act", "mish", "hidden_act = 'mish'"),
        ("vit_config.json", "layer_norm_eps", "small", "layer_norm_eps = 'small'"),
        ("vit_config.json", "num_attention_heads", 5, "heads"),  # of a width of 48
        ("config.json", "connector_act", "mish", "connector_act = 'mish'"),
        ("config.json", "interpolate_pos", "no", "interpolate_pos = 'no'"),
        ("config.json", "vae_config", "flux", "vae_config = 'flux'"),
        ("config.json", "vae_config", {"scale_factor": "big"}, "scale_factor"),
    ],
)
def test_field_that_makes_no_sense(header_dir, file, field, value, told):
    """Anything that would make the model compute nonsense later is refused while the files are read."""
    directory = header_dir()
    checkpoints.edit_json(directory / file, **{field: value})
    with pytest.raises(InputError) as error:
        config_of(directory)
    assert f"{directory / file} " in str(error.value)
    assert told in str(error.value)


@pytest.mark.parametrize("file", ["llm_config.json", "vit_config.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b'{"hidden_size": 64', b"\xff\xfe\x00", b"[]", b"64"])
def test_json_that_is_none(header_dir, file, content):
    """A json file that was cut or replaced by an error page is told by its name."""
    directory = header_dir()
    (directory / file).write_bytes(content)
    with pytest.raises(InputError, match=rf"{file}.*json"):
        config_of(directory)


@pytest.mark.parametrize("file", ["llm_config.json", "vit_config.json"])
def test_json_missing(header_dir, file):
    """Without the file, and without its object in config.json, it is asked for by name."""
    directory = header_dir()
    (directory / file).unlink()
    with pytest.raises(InputError, match=rf"{file} does not exist"):
        config_of(directory)


def test_sizes_inside_config_json(tiny_dir, header_dir):
    """The published config.json repeats both objects; they do when their own files are not there."""
    directory = header_dir()
    parts = {name: json.loads((directory / f"{name}.json").read_text()) for name in ("llm_config", "vit_config")}
    for name in parts:
        (directory / f"{name}.json").unlink()
    checkpoints.edit_json(directory / "config.json", **parts)
    assert config_of(directory) == config_of(tiny_dir)


def test_defaults_without_config_json(tiny_dir, header_dir):
    """config.json holds nothing that cannot be known without it."""
    directory = header_dir()
    (directory / "config.json").unlink()
    assert config_of(directory) == config_of(tiny_dir)


def test_stated_values_are_used(header_dir):
    """What the json files do say is not replaced by a default."""
    directory = header_dir()
    checkpoints.edit_json(directory / "llm_config.json", rope_theta=500, rms_norm_eps=1e-5)
    checkpoints.edit_json(directory / "vit_config.json", layer_norm_eps=1e-5, hidden_act="gelu")
    vae = {"scale_factor": 0.5, "shift_factor": 0.25}
    checkpoints.edit_json(directory / "config.json", connector_act="relu", interpolate_pos=True, vae_config=vae)
    config = config_of(directory)
    assert (config.trunk.rope_theta, config.trunk.norm_eps) == (500.0, 1e-5)
    assert (config.vit.norm_eps, config.vit.activation) == (1e-5, "gelu")
    assert (config.connector_activation, config.interpolate_positions) == ("relu", True)
    assert (config.autoencoder.scale_factor, config.autoencoder.shift_factor) == (0.5, 0.25)
