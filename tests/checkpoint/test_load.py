"""From tensors to parameters: the right values, the right way round, in little memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import checkpoints
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.models.weights import flatten

# Where each tensor belongs, written down a second time: (tensor's name, parameter's path). `#` is the layer.
_EXPERTS = (("", "und"), ("_moe_gen", "gen"))
_LAYER, _VIT = "language_model.model.layers.#", "vit_model.vision_model"
LINEARS = {
    "language_model.lm_head": "trunk.lm_head",
    "connector.fc1": "connector.fc1",
    "connector.fc2": "connector.fc2",
    "time_embedder.mlp.0": "time_embed.fc1",
    "time_embedder.mlp.2": "time_embed.fc2",
    "vae2llm": "latent_in",
    "llm2vae": "latent_out",
    f"{_VIT}.embeddings.patch_embedding": "vit.patch_embed",
    f"{_VIT}.encoder.layers.#.self_attn.q_proj": "vit.layers.q",
    f"{_VIT}.encoder.layers.#.self_attn.k_proj": "vit.layers.k",
    f"{_VIT}.encoder.layers.#.self_attn.v_proj": "vit.layers.v",
    f"{_VIT}.encoder.layers.#.self_attn.out_proj": "vit.layers.o",
    f"{_VIT}.encoder.layers.#.mlp.fc1": "vit.layers.fc1",
    f"{_VIT}.encoder.layers.#.mlp.fc2": "vit.layers.fc2",
}
NORMS = {
    "language_model.model.norm": "trunk.norm",
    "language_model.model.norm_moe_gen": "trunk.norm_gen",
    f"{_VIT}.encoder.layers.#.layer_norm1": "vit.layers.norm1",
    f"{_VIT}.encoder.layers.#.layer_norm2": "vit.layers.norm2",
    f"{_VIT}.post_layernorm": "vit.post_norm",
}
TABLES = {
    "language_model.model.embed_tokens.weight": "trunk.embed",
    f"{_VIT}.embeddings.position_embedding.weight": "vit.positions",
    "vit_pos_embed.pos_embed": "vit_positions",
    "latent_pos_embed.pos_embed": "latent_positions",
}
for _suffix, _expert in _EXPERTS:
    _to = f"trunk.layers.{_expert}"
    LINEARS |= {f"{_LAYER}.self_attn.{x}_proj{_suffix}": f"{_to}.{x}" for x in "qkvo"}
    LINEARS |= {f"{_LAYER}.mlp{_suffix}.{x}_proj": f"{_to}.{x}" for x in ("gate", "up", "down")}
    NORMS |= {f"{_LAYER}.self_attn.{x}_norm{_suffix}": f"{_to}.{x}_norm" for x in "qk"}
    NORMS[f"{_LAYER}.input_layernorm{_suffix}"] = f"{_to}.input_norm"
    NORMS[f"{_LAYER}.post_attention_layernorm{_suffix}"] = f"{_to}.post_norm"


def place(kind: str, name: str, tensor: np.ndarray) -> tuple[str, int | None, np.ndarray]:
    """Where a tensor belongs: the parameter's path, the layer, and the value turned the parameter's way."""
    if kind == "ae":
        module, leaf = name.rsplit(".", 1)
        if leaf == "bias":
            return f"autoencoder.{name}", None, tensor
        if tensor.ndim == 4:  # [out, in, row, column] -> [row, column, in, out]
            return f"autoencoder.{module}.kernel", None, np.moveaxis(tensor, (2, 3, 1, 0), (0, 1, 2, 3))
        return f"autoencoder.{module}.scale", None, tensor
    found = re.search(r"\.layers\.(\d+)\.", name)
    layer = int(found[1]) if found else None
    name = re.sub(r"\.layers\.\d+\.", ".layers.#.", name)
    if name in TABLES:
        return f"{TABLES[name]}.embedding", layer, tensor
    module, leaf = name.rsplit(".", 1)
    if module in NORMS:
        return f"{NORMS[module]}.{'scale' if leaf == 'weight' else 'bias'}", layer, tensor
    return f"{LINEARS[module]}.{'kernel' if leaf == 'weight' else 'bias'}", layer, tensor.T


def placed(directory: Path) -> dict[str, np.ndarray]:
    """All parameters of a checkpoint, put together by `place`."""
    parts: dict[str, dict[int | None, np.ndarray]] = {}
    for kind, file in checkpoints.FILES.items():
        for name, tensor in checkpoints.read_tensors(directory / file).items():
            path, layer, value = place(kind, name, tensor)
            assert layer not in parts.setdefault(path, {}), f"two tensors for {path} of layer {layer}"
            parts[path][layer] = value
    sizes = json.loads((directory / "llm_config.json").read_text())
    width = sizes["hidden_size"] // sizes["num_attention_heads"]
    whole = {
        path: layers[None] if None in layers else np.stack([layers[i] for i in range(len(layers))])
        for path, layers in parts.items()
    }
    return {path: by_head(path, value, width) for path, value in whole.items()}


def by_head(path: str, value: np.ndarray, width: int) -> np.ndarray:
    """Projections of the trunk have an axis of heads; each head's numbers lie side by side in the tensor."""
    if re.fullmatch(r"trunk\.layers\.(und|gen)\.[qkv]\.(kernel|bias)", path):
        return value.reshape(*value.shape[:-1], -1, width)
    if re.fullmatch(r"trunk\.layers\.(und|gen)\.o\.kernel", path):
        return value.reshape(value.shape[0], -1, width, value.shape[-1])
    return value


def loaded(directory: Path, dtype, progress=None) -> dict[str, np.ndarray]:
    params = ModelSource.open(directory).load(dtype, progress).params
    return {path: np.asarray(x) for path, x in flatten(params).items()}


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16 (ties to even), by its bits."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)


def assert_same(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert ours.keys() == expected.keys()
    for path, x in expected.items():
        assert ours[path].dtype == x.dtype, path
        assert np.array_equal(ours[path], x), path


def test_every_tensor_is_where_it_belongs(tiny, tiny_dir):
    """Every value of every tensor, by a second list of names; no two tensors are equal, so none may be swapped."""
    tensors = [x for file in checkpoints.FILES.values() for x in checkpoints.read_tensors(tiny_dir / file).values()]
    assert len({x.tobytes() for x in tensors}) == len(tensors)
    ours = {path: np.asarray(x) for path, x in flatten(tiny.load_weights()[0].params).items()}
    assert_same(ours, placed(tiny_dir))


def test_vit_patch_weight_axis_order(tiny, tiny_dir):
    """REGRESSION 18: the weight is [out, row, column, channel]; read otherwise, images are seen scrambled."""
    tensors = checkpoints.read_tensors(tiny_dir / checkpoints.FILES["ema"])
    prefix = "vit_model.vision_model.embeddings.patch_embedding"
    weight, bias = tensors[f"{prefix}.weight"].reshape(48, 14, 14, 3), tensors[f"{prefix}.bias"]
    image = np.random.RandomState(0).uniform(-1, 1, (28, 42, 3)).astype(np.float32)
    expected = np.stack(
        [
            np.einsum("orcx,rcx->o", weight, image[14 * y : 14 * y + 14, 14 * x : 14 * x + 14]) + bias
            for y in range(2)
            for x in range(3)
        ]
    )
    patches = image.reshape(2, 14, 3, 14, 3).swapaxes(1, 2).reshape(6, -1)
    ours = tiny.load_weights()[0].model().vit.patch_embed(patches)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_convolution_is_the_right_way_round(tiny, tiny_dir):
    """A kernel with rows and columns, or in and out, swapped: the autoencoder's images are smeared."""
    tensors = checkpoints.read_tensors(tiny_dir / checkpoints.FILES["ae"])
    weight, bias = tensors["encoder.conv_in.weight"], tensors["encoder.conv_in.bias"]
    pixels = np.random.RandomState(1).uniform(-1, 1, (5, 7, 3)).astype(np.float32)
    ours = np.asarray(tiny.load_weights()[0].model().autoencoder.encoder.conv_in(pixels[None]))[0]
    for y, x in ((1, 1), (2, 4), (3, 5)):
        window = pixels[y - 1 : y + 2, x - 1 : x + 2]
        np.testing.assert_allclose(ours[y, x], np.einsum("oirc,rci->o", weight, window) + bias, atol=1e-5)


def test_linear_is_the_right_way_round(tiny, tiny_dir):
    """A square weight fits transposed, too; only its product tells."""
    tensors = checkpoints.read_tensors(tiny_dir / checkpoints.FILES["ema"])
    weight, bias = tensors["connector.fc2.weight"], tensors["connector.fc2.bias"]
    x = np.random.RandomState(2).standard_normal(64).astype(np.float32)
    ours = tiny.load_weights()[0].model().connector.fc2(x[None])[0]
    np.testing.assert_allclose(ours, weight @ x + bias, atol=1e-5)


def stored_as(dtypes: Callable, tiny_dir: Path, directory: Path) -> dict[str, np.ndarray]:
    """Writes tiny-bagel with its tensors in other dtypes, `dtypes(layer)`; returns what float32 makes of them."""
    checkpoints.copy(tiny_dir, directory)
    upcast = checkpoints.copy(tiny_dir, directory.with_name("upcast"))
    for kind, file in checkpoints.FILES.items():
        tensors = checkpoints.read_tensors(tiny_dir / file)
        stored = {name: x.astype(dtypes(place(kind, name, x)[1])) for name, x in tensors.items()}
        checkpoints.write_tensors(directory / file, stored)
        checkpoints.write_tensors(upcast / file, {name: x.astype(np.float32) for name, x in stored.items()})
    return placed(upcast)


def test_stored_dtypes_load_as_float32(tiny_dir, tmp_path):
    """The published file is bfloat16: in float32 its values are exactly those, layer by layer if they differ."""
    dtypes = {None: ml_dtypes.bfloat16, 0: ml_dtypes.bfloat16, 1: np.float16, 2: np.float64}
    expected = stored_as(dtypes.get, tiny_dir, tmp_path / "model")
    exact = placed(tiny_dir)
    assert np.array_equal(expected["connector.fc1.bias"], rounded(exact["connector.fc1.bias"]).astype(np.float32))
    assert np.array_equal(expected["vit.layers.q.kernel"][2], exact["vit.layers.q.kernel"][2])
    assert_same(loaded(tmp_path / "model", jnp.float32), expected)


def test_float32_loads_as_bfloat16(tiny_dir):
    """Rounded to nearest, as PyTorch's `.to(torch.bfloat16)`; not cut off."""
    assert_same(loaded(tiny_dir, jnp.bfloat16), {path: rounded(x) for path, x in placed(tiny_dir).items()})


def test_bfloat16_loads_as_bfloat16(tiny_dir, tmp_path):
    """What the file has is what is loaded, bit for bit; and a load of 29 GB shows how far it is."""
    stored_as(lambda _: ml_dtypes.bfloat16, tiny_dir, tmp_path / "model")
    seen = []
    ours = loaded(tmp_path / "model", jnp.bfloat16, lambda *event: seen.append(event))
    assert_same(ours, {path: rounded(x) for path, x in placed(tiny_dir).items()})
    assert seen == [(i, len(ours)) for i in range(len(ours) + 1)]


def child(code: str, *args: object, **environment: str) -> dict:
    """Runs Python code in a process of its own; returns the json that it prints last."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


_LOAD = """
import json, sys
import jax, jax.numpy as jnp
from bagel_jax.bagel import Bagel
def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name + ":"))
model = Bagel.open(sys.argv[1], dtype="bfloat16")
jax.block_until_ready(jnp.zeros(8) + 1)
before = memory("VmRSS")
params = model.load_weights()[0].params
held = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps({"held": held, "peak": memory("VmHWM") - before, "torch": "torch" in sys.modules}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("stored", ["F32", "BF16"])
def test_weights_loaded_in_float32_first(tmp_path, stored):
    """REGRESSION 37: the peak of a load stays well below two copies of the model, and PyTorch is not needed.

    29 GB of bfloat16 that go through float32, or are read whole before they are stacked, fit no machine that the
    model itself would fit.
    """
    count = checkpoints.write_medium(tmp_path / "model", stored)
    result = child(_LOAD, tmp_path / "model")
    assert result["held"] == 2 * count
    assert result["peak"] < 1.75 * result["held"]
    assert not result["torch"]


_SHARDED = """
import contextlib, json, sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.checkpoint.load import PublishedCheckpoint
from bagel_jax.checkpoint.files import CheckpointFiles
from bagel_jax.checkpoint.sizes import read_config
files = CheckpointFiles(Path(sys.argv[1]))
checkpoint = PublishedCheckpoint(files, read_config(files))
reading, numbers = files.reading, []
@contextlib.contextmanager
def counted():
    with reading() as read:
        def count(*args):
            part = read(*args)
            numbers.append(part.size)
            return part
        yield count
files.reading = counted
mesh = jax.make_mesh((2,), ("x",))
whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
cut, wrong, refused = 0, [], []
for target in checkpoint.targets:
    if not ("layers." in target.path or "mid.attn_1" in target.path or "patch_embed" in target.path):
        continue
    expected = np.asarray(checkpoint.read(target, np.float32, whole))
    for axis, size in enumerate(target.shape):
        if size % 2 == 0:
            spec = PartitionSpec(*[None] * axis, "x")
            numbers.clear()
            try:
                ours = checkpoint.read(target, np.float32, NamedSharding(mesh, spec))
            except ValueError as error:
                refused.append([target.path, axis - len(target.shape), str(error)])
                continue
            cut += 1
            good = np.array_equal(ours, expected) and ours.addressable_shards[0].data.size * 2 == expected.size
            if not good or sum(numbers) != expected.size:
                wrong.append([target.path, axis, sum(numbers)])
print(json.dumps({"cut": cut, "wrong": wrong, "refused": refused}))
"""


def test_devices_read_their_parts(tiny_dir):
    """Split over two devices along any axis, the parts are those of the whole: no transposed slices, nothing twice.

    Only the numbers of a head lie on one device always.
    """
    result = child(_SHARDED, tiny_dir, XLA_FLAGS="--xla_force_host_platform_device_count=2", JAX_PLATFORMS="cpu")
    assert result["cut"] > 80
    assert result["wrong"] == []
    kernels = {f"trunk.layers.{expert}.{name}.kernel" for expert in ("und", "gen") for name in "qkvo"}
    biases = {f"trunk.layers.{expert}.{name}.bias" for expert in ("und", "gen") for name in "qkv"}
    assert {path for path, _, _ in result["refused"]} == kernels | biases
    assert len(result["refused"]) == len(kernels | biases)
    for path, axis, error in result["refused"]:
        assert axis == (-2 if ".o." in path else -1)
        assert f"{path} is asked for from " in error
        assert "a head is read whole" in error
