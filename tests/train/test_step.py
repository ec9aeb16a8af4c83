"""One step: what is trained and what is not, accumulation, the average, and that a model learns at all."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import NEW, TINY, full_batch, write_config

from bagel_jax.errors import InputError
from bagel_jax.models.weights import abstract_weights, flatten
from bagel_jax.placement.mesh import make_mesh
from bagel_jax.train.config import COMPONENT_NAMES
from bagel_jax.train.loop import make_loss
from bagel_jax.train.optimizer import make_optimizer
from bagel_jax.train.start import make_start, sine_table, trainable_paths
from bagel_jax.train.step import TrainState, make_step

# What each component's parameters begin with.
BEGINNINGS = {
    "embedding": ("trunk.embed.", "trunk.lm_head."),
    "und_expert": ("trunk.layers.und.", "trunk.norm."),
    "gen_expert": ("trunk.layers.gen.", "trunk.norm_gen."),
    "vit": ("vit.",),
    "connectors": ("connector.", "time_embed.", "latent_in.", "latent_out.", "vit_positions.", "latent_positions."),
    "autoencoder": ("autoencoder.",),
}
TABLES = {"latent_positions.embedding", "vit_positions.embedding"}
SHAPES = {path: leaf.shape for path, leaf in flatten(abstract_weights(TINY, jnp.float32).params).items()}


@pytest.fixture
def config(tmp_path):
    """`config(...)` makes a run's configuration from changes to its tables."""
    return lambda **changes: write_config(tmp_path, **changes)[0]


@pytest.fixture
def start(config):
    """`start(...)` makes what such a run starts from."""
    return lambda **changes: make_start(config(**changes), make_mesh())


def copied(params):
    """Parameters as NumPy arrays of their own."""
    return jax.tree.map(lambda x: np.array(x), params)


def run(c, start, batches, steps):
    """So many steps over one batch: the last state and each step's report."""
    optimizer = make_optimizer(c.optimizer, c.run.steps)
    step = make_step(make_loss(c, start, make_mesh()), optimizer, ema=c.optimizer.ema, seed=c.seed)
    state, reports = TrainState.create(jax.tree.map(jnp.copy, start.trainable), optimizer), []
    for _ in range(steps):
        state, report = step(state, start.frozen, batches)
        reports.append({name: float(value) for name, value in report.items()})
    return state, reports


@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_frozen_component_is_not_trained(config, name):
    """`freeze` freezes something else, or part of it goes on learning."""
    frozen, everything = (trainable_paths(config(model={"freeze": freeze}), SHAPES) for freeze in ([name], []))
    mine = {path for path in SHAPES if path.startswith(BEGINNINGS[name])}
    assert mine
    assert not frozen & mine
    assert frozen == everything - mine
    assert set(BEGINNINGS) == set(COMPONENT_NAMES)


def test_everything_but_tables_and_autoencoder_is_trained(config):
    """A part of the model never learns; or position tables and autoencoder, which are fixed officially, drift."""
    chosen = trainable_paths(config(), SHAPES)
    assert chosen == {path for path in SHAPES if not path.startswith("autoencoder.")} - TABLES
    alone = trainable_paths(config(objective={"kind": "autoencoder"}), SHAPES)
    assert alone == {path for path in SHAPES if path.startswith("autoencoder.")}


def test_nothing_left_to_train_is_an_error(start):
    """A run over everything frozen takes its hours and changes nothing."""
    with pytest.raises(InputError, match="freeze"):
        start(model={"freeze": [name for name in BEGINNINGS if name != "autoencoder"]})
    with pytest.raises(InputError, match="freeze"):
        start(model={"freeze": ["autoencoder"]}, objective={"kind": "autoencoder"})


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """Forty steps in float32: reports."""
    c, _ = write_config(tmp_path_factory.mktemp("long"))
    return run(c, make_start(c, make_mesh()), full_batch(), 40)[1]


@pytest.fixture(scope="module")
def half_run(tmp_path_factory):
    """Three steps in bfloat16 with two components frozen: parameters before, the start, the last state, reports."""
    c, _ = write_config(
        tmp_path_factory.mktemp("half"), model={"freeze": ["und_expert", "vit"]}, run={"dtype": "bfloat16"}
    )
    begin = make_start(c, make_mesh())
    before = copied(begin.frozen | begin.trainable)
    return before, begin, *run(c, begin, full_batch(), 3)


def test_steps_change_what_is_trained_and_nothing_else(half_run):
    """Frozen weights move after all, or some trained ones have no gradient and stay as they were drawn."""
    before, begin, state, reports = half_run
    frozen = {path for path in SHAPES if path.startswith((*BEGINNINGS["und_expert"], "vit.", "autoencoder."))} | TABLES
    assert set(begin.frozen) == frozen
    for path in frozen:
        np.testing.assert_array_equal(begin.frozen[path], before[path])
    assert set(state.trainable) == set(state.ema) == set(SHAPES) - frozen
    assert [path for path, array in state.trainable.items() if np.array_equal(array, before[path])] == []
    assert all(report["grad_norm"] > 0 for report in reports)
    assert int(state.step) == 3


def test_bfloat16_computes_so_and_keeps_float32(half_run, long_run):
    """In bfloat16 small updates are rounded away, or the whole run is slow because it computes in float32."""
    _, _, state, reports = half_run
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    # Before the first step the two models are the same.
    assert reports[0]["loss"] != long_run[0]["loss"]
    assert reports[0]["loss"] == pytest.approx(long_run[0]["loss"], rel=0.03)


def test_loss_falls(long_run):
    """The model does not learn, neither to answer nor to see through noise."""
    assert long_run[0]["loss"] == pytest.approx(long_run[0]["ce"] + long_run[0]["mse"], rel=1e-5)
    for name in ("ce", "mse"):
        assert long_run[-1][name] < 0.5 * long_run[0][name]


def test_what_is_frozen_takes_no_more_room_than_it_must(config):
    """A frozen 7B is held in float32 while it is computed with in bfloat16; or latents are encoded in bfloat16."""
    begin = make_start(config(model={"freeze": ["vit"]}), make_mesh(), jnp.bfloat16)
    for path, array in begin.frozen.items():
        assert array.dtype == (jnp.float32 if path.startswith("autoencoder.") else jnp.bfloat16)
    assert {array.dtype for array in begin.trainable.values()} == {jnp.dtype("float32")}


def test_positions_are_sines():
    """A new model's images have no place, or other places than the official ones."""
    table = sine_table(4, 16)
    frequencies = 1e4 ** (-np.arange(4) / 4)
    row, column = 2, 3
    expected = np.concatenate([f(n * frequencies) for n in (column, row) for f in (np.sin, np.cos)])
    np.testing.assert_allclose(table[row * 4 + column], expected, rtol=1e-6, atol=1e-6)
    assert sine_table(2, 18).shape == (4, 18)


@pytest.mark.slow
def test_a_new_model(start):
    """A new model is the same whatever the seed, starts with a velocity, or without positions."""
    begins = [start(model=NEW, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (begin.frozen | begin.trainable for begin in begins)
    np.testing.assert_array_equal(first["latent_positions.embedding"], sine_table(TINY.max_latent_size, 16))
    np.testing.assert_array_equal(first["vit_positions.embedding"], sine_table(TINY.max_vit_patches, 16))
    assert not np.any(first["latent_out.kernel"])
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    kernels = [name for name in first if name.endswith(".kernel") and name != "latent_out.kernel"]
    assert [name for name in kernels if np.array_equal(first[name], other[name])] == []


def quadratic(trainable, frozen, batch, key):
    """Half the mean squared distance of `x` to the batch's points; its gradient is x - mean."""
    loss = 0.5 * jnp.mean(jnp.sum((trainable["x"] * frozen["one"] - batch) ** 2, axis=-1))
    return loss, {"draw": jax.random.uniform(key)}


def points(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def simple(optimizer, *, ema=0.9, seed=0):
    """A step of the quadratic, and the state before it."""
    step = make_step(quadratic, optimizer, ema=ema, seed=seed)
    return step, TrainState.create({"x": jnp.array([1.0, -2.0, 3.0])}, optimizer), {"one": jnp.ones(())}


def test_accumulated_gradients_are_averaged():
    """Twice the accumulation takes twice as long a step, or only the last batch counts."""
    batches = points(3, 5, 3)
    step, state, frozen = simple(optax.sgd(0.1))
    after, report = step(state, frozen, batches)
    mean = np.mean(batches, axis=(0, 1))
    x = np.array([1.0, -2.0, 3.0])
    np.testing.assert_allclose(after.trainable["x"], x - 0.1 * (x - mean), rtol=1e-5)
    np.testing.assert_allclose(report["grad_norm"], np.linalg.norm(x - mean), rtol=1e-5)
    np.testing.assert_allclose(report["loss"], 0.5 * ((x - batches) ** 2).sum(-1).mean(), rtol=1e-5)
    assert int(after.step) == 1
    step, state, frozen = simple(optax.sgd(0.1))
    whole, _ = step(state, frozen, batches.reshape(1, 15, 3))
    np.testing.assert_allclose(whole.trainable["x"], after.trainable["x"], rtol=1e-5)


def test_average():
    """The exported weights are the last ones, or lag far behind them."""
    step, state, frozen = simple(optax.sgd(0.5), ema=0.75)
    expected = x = np.array(state.trainable["x"], np.float64)
    for i in range(3):
        batches = points(1, 4, 3, seed=i)
        state, _ = step(state, frozen, batches)
        x = x - 0.5 * (x - batches.mean(axis=(0, 1)))
        expected = 0.75 * expected + 0.25 * x
    np.testing.assert_allclose(state.trainable["x"], x, rtol=1e-5)
    np.testing.assert_allclose(state.ema["x"], expected, rtol=1e-5)


def test_each_step_draws_anew_and_a_seed_draws_the_same():
    """The same noise in every step, every accumulated batch or every run; or a run that cannot be repeated."""

    def draws(seed, accumulate):
        step, state, frozen = simple(optax.sgd(0.1), seed=seed)
        found = []
        for _ in range(2):
            state, report = step(state, frozen, points(accumulate, 4, 3))
            found.append(float(report["draw"]))
        return found

    first, second = draws(0, 1)
    assert first != second
    assert draws(0, 1) == [first, second]
    assert draws(1, 1)[0] != first
    assert draws(0, 2)[0] != first  # the mean of two different draws


def test_gradients_are_clipped(config):
    """One odd batch throws the model off."""
    c = config(optimizer={"max_grad_norm": 0.5, "learning_rate": 1.0})
    o = make_optimizer(c.optimizer, c.run.steps)
    big = {"x": jnp.array([30.0, 40.0]), "y": jnp.array([0.0])}
    _, moments = o.update(big, o.init(big), big)
    mu = next(
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(moments) if "mu['x']" in jax.tree_util.keystr(path)
    )
    np.testing.assert_allclose(mu, 0.1 * np.array([0.3, 0.4]), rtol=1e-5)
