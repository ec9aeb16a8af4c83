"""Low-rank adapters: where they are, that they start as nothing, and that merging them is what they do."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import TINY, full_batch, tiny_weights, write_config

from bagel_jax.models.weights import flatten
from bagel_jax.placement.mesh import make_mesh
from bagel_jax.train.config import LoraTable
from bagel_jax.train.loop import make_loss
from bagel_jax.train.lora import adapted, init_adapters, merge_adapters
from bagel_jax.train.start import make_start
from bagel_jax.train.step import TrainState, make_step


@pytest.fixture(scope="module")
def params():
    """The tiny model's parameters by path."""
    return flatten(tiny_weights().params)


def random_adapters(lora, params):
    """Adapters that do change something."""
    generator = np.random.RandomState(1)
    shapes = {name: x.shape for name, x in init_adapters(lora, params, 0).items()}
    return {name: jnp.asarray(0.3 * generator.standard_normal(s), jnp.float32) for name, s in shapes.items()}


@pytest.mark.parametrize(
    ("projections", "experts"),
    [(("q", "k", "v", "o"), ("und", "gen")), (("gate", "up", "down"), ("gen",)), (("q",), ("und",))],
)
def test_the_projections_that_were_asked_for(params, projections, experts):
    """Adapters go to other weights than the configuration says, or to both experts where one was asked for."""
    lora = LoraTable(rank=3, projections=projections, experts=experts)
    names = {f"trunk.layers.{expert}.{name}.kernel" for expert in experts for name in projections}
    assert set(adapted(lora)) == names
    adapters = init_adapters(lora, params, 0)
    assert set(adapters) == {f"{name}.lora_{x}" for name in names for x in "ab"}
    for name in names:
        layers, *widths = params[name].shape
        between = 2 if name.endswith(".o.kernel") else 1
        assert adapters[f"{name}.lora_a"].shape == (layers, *widths[:between], 3)
        assert adapters[f"{name}.lora_b"].shape == (layers, 3, *widths[between:])
    merged = merge_adapters(lora, params, random_adapters(lora, params))
    assert {name for name in params if not np.array_equal(merged[name], params[name])} == names


def test_new_adapters_change_nothing(params):
    """A run starts from another model than the one that it was given."""
    lora = LoraTable(rank=4)
    adapters = init_adapters(lora, params, 0)
    merged = merge_adapters(lora, params, adapters)
    assert set(merged) == set(params)
    for name, array in params.items():
        np.testing.assert_array_equal(merged[name], array)
    # But they can learn: A is there, and another one for each weight and seed.
    first, second = (np.asarray(adapters[f"trunk.layers.{e}.q.kernel.lora_a"]) for e in ("und", "gen"))
    assert first.std() == pytest.approx(TINY.trunk.hidden_size**-0.5, rel=0.3)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first[0], first[1])
    other = init_adapters(lora, params, 1)["trunk.layers.und.q.kernel.lora_a"]
    assert not np.array_equal(first, other)


def test_merged_weights_do_what_adapters_do(params):
    """The exported model answers otherwise than the one that was trained: another scale, or A and B the wrong way."""
    lora = LoraTable(rank=3, alpha=6.0, projections=("q", "k", "v", "o", "down"), experts=("gen",))
    adapters = random_adapters(lora, params)
    merged = merge_adapters(lora, params, adapters)
    t = TINY.trunk
    widths = {"down": t.mlp_width, "o": t.num_heads * t.head_dim}
    for path in adapted(lora):
        # As the published layout has them: heads and their width as one axis.
        width_in = widths.get(path.split(".")[-2], t.hidden_size)
        kernel, before = (np.asarray(x[path], np.float64).reshape(2, width_in, -1) for x in (merged, params))
        a = np.asarray(adapters[f"{path}.lora_a"], np.float64).reshape(2, width_in, 3)
        b = np.asarray(adapters[f"{path}.lora_b"], np.float64).reshape(2, 3, -1)
        x = np.random.RandomState(0).standard_normal((2, 5, width_in))
        np.testing.assert_allclose(x @ kernel, x @ before + 2 * ((x @ a) @ b), rtol=1e-5, atol=1e-5)


def test_merging_keeps_the_dtype(params):
    """A frozen model in bfloat16 is held in float32 once more, or the sum is rounded before it is added up."""
    lora = LoraTable(rank=3, projections=("q",), experts=("und",))
    half = {name: array.astype(jnp.bfloat16) for name, array in params.items()}
    adapters = random_adapters(lora, params)
    merged = merge_adapters(lora, half, adapters)
    assert {array.dtype for array in merged.values()} == {jnp.dtype("bfloat16")}
    name = "trunk.layers.und.q.kernel"
    exact = merge_adapters(lora, {k: v.astype(jnp.float32) for k, v in half.items()}, adapters)[name]
    np.testing.assert_array_equal(merged[name], exact.astype(jnp.bfloat16))


@pytest.mark.slow
def test_only_adapters_learn(tmp_path):
    """Weights that were to be frozen move; or adapters do not, or only half of them."""
    c, _ = write_config(tmp_path, lora={"rank": 2, "experts": ["gen"]}, run={"dtype": "float32"})
    start = make_start(c, make_mesh())
    assert len(start.trainable) == 8
    before, frozen = ({k: np.array(v) for k, v in x.items()} for x in (start.trainable, start.frozen))
    optimizer = optax.adam(1e-2)
    step = make_step(make_loss(c, start, make_mesh()), optimizer, ema=0.9, seed=0)
    state, losses = TrainState.create(start.trainable, optimizer), []
    for _ in range(15):
        state, report = step(state, start.frozen, full_batch())
        losses.append(float(report["loss"]))
    assert set(state.trainable) == set(before)
    for name, array in state.trainable.items():
        assert not np.array_equal(array, before[name]), name
    for name, array in frozen.items():
        np.testing.assert_array_equal(start.frozen[name], array)
    assert losses[-1] < losses[0]
