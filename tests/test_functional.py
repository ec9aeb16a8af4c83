"""BAGEL on one page: equal to the official code and to the engine, and differentiable in all that it takes."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import process
from golden import GENERATION, UNDERSTANDING, Case, relative_error
from small import CONFIG, model, random_image, weights

from bagel_jax import InputError, Request
from bagel_jax import functional as F
from bagel_jax.models.layers import unrolled
from bagel_jax.models.weights import Weights, abstract_weights, fill, flatten

EXAMPLES = Path(__file__).parents[1] / "examples"
ANSWER = (5, 9, 300)


def example(name):
    """A file of `examples/` as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def edit(**settings):
    """A prepared edit of two images between texts, with a negative prompt: all that a context can hold."""
    inputs = [random_image(0), "a red bench", random_image(1, 24, 40), "no, a blue one"]
    settings = {"steps": 5, "cfg_interval": (0.0, 1.0), "negative_prompt": "a dog"} | settings
    return model().prepare(Request.create("img2img", inputs=inputs, **settings))


@cache
def edit_contexts():
    return F.contexts(*model().functional(), edit())


def velocity_of(contexts, x=None, params=None, t=0.6, **options):
    """The velocity of an edit's latents behind the full context."""
    definition, own = model().functional()
    x = edit().initial_latent if x is None else x
    return F.velocity(definition, params or own, x, t, contexts.cond, edit().latent_grid, **options)


# ---- the numbers


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n.startswith("img2img") else n for n in GENERATION]
)
def test_images_are_the_official_codes(tiny, cases_dir, name):
    """What everything else is tested against computes another model; or the engine does."""
    case = Case.read(cases_dir, name)
    prepared, (definition, params) = tiny.prepare(case.request()), tiny.functional()
    s = prepared.request.settings
    contexts = F.contexts(definition, params, prepared, thought=case.texts[0] if case.texts else None)
    points = F.timesteps(s.steps, s.timestep_shift)
    arguments = prepared.initial_latent, contexts, prepared.latent_grid, points
    x = F.denoise(definition, params, *arguments, guidance=F.CFG(s))
    assert relative_error(x, case.arrays["final_latent"]) < 1e-5
    assert relative_error(x, tiny.run(prepared).latents) < 1e-5
    pixels = np.asarray(F.decode(definition, params, x, prepared.latent_grid))
    assert np.abs((pixels * 255).astype(np.uint8).astype(int) - case.image).max() <= 1


@pytest.mark.parametrize("name", [*UNDERSTANDING, "text2img_think"])
def test_logits_are_the_official_codes(tiny, cases_dir, name):
    """The chances of an answer are those of other tokens, or of another prompt."""
    case = Case.read(cases_dir, name)
    prepared, ids = tiny.prepare(case.request()), case.arrays["text_ids"][1:]
    logits = F.logits(*tiny.functional(), prepared, ids)
    assert relative_error(logits, case.arrays["text_logits"]) < 1e-5
    chances = np.asarray(F.log_prob(*tiny.functional(), prepared, ids))
    told = [*ids, tiny.tokenizer.im_end]
    np.testing.assert_allclose(chances, np.asarray(jax.nn.log_softmax(logits))[np.arange(len(told)), told], rtol=1e-6)


def test_log_prob_is_the_chance_of_a_whole_answer():
    """Answers' chances do not add up to one, since an end is missing or a token is counted for another's place."""
    prepared = model().prepare(Request.create("text2text", "what?"))
    score = partial(F.log_prob, *model().functional(), prepared)
    text = model().tokenizer.prompt("a red circle")[1:-1]
    np.testing.assert_array_equal(score("a red circle"), score(text))
    assert score(text).shape == (len(text) + 1,)
    # Two answers that begin alike: the shorter one's end is one of the tokens that could have followed.
    np.testing.assert_allclose(score(ANSWER)[:2], score(ANSWER[:2])[:2], rtol=1e-5)
    following = jax.nn.log_softmax(F.logits(*model().functional(), prepared, ANSWER))[2]
    assert float(following[model().tokenizer.im_end]) == pytest.approx(float(score(ANSWER[:2])[2]), rel=1e-5)


@pytest.mark.parametrize("make", ["edit", "small"])
def test_latents_are_the_engines(make):
    """The engine makes another image, of images between texts, or of a size smaller than its programs."""
    prepared = edit()
    if make == "small":
        prepared = model().prepare(Request.create("text2img", "a clock", height=16, width=24, steps=5))
    (definition, params), s = model().functional(), prepared.request.settings
    contexts = F.contexts(definition, params, prepared)
    points = F.timesteps(s.steps, s.timestep_shift)
    arguments = prepared.initial_latent, contexts, prepared.latent_grid, points
    x = F.denoise(definition, params, *arguments, guidance=F.CFG(s))
    assert relative_error(x, model().run(prepared).latents) < 1e-5
    assert len(contexts.distinct) == {"edit": 3, "small": 2}[make]


def test_encoded_and_decoded():
    """Pixels are taken for those of another range, or the posterior's noise does not count."""
    image, noise = edit().images[0], edit().posterior_noise[0]
    autoencoder = weights().model().autoencoder
    encode = partial(F.encode, *model().functional(), image.vae_pixels * 0.5 + 0.5)
    patchify = weights().model().patchify_latents
    for given in (noise, 0 * noise):
        wanted = patchify(autoencoder.encode(image.vae_pixels[None], given[None])[0])
        assert relative_error(encode(given), wanted) < 1e-5
    np.testing.assert_array_equal(encode(), encode(0 * noise))
    pixels = F.decode(*model().functional(), 30 * edit().initial_latent, edit().latent_grid)
    assert pixels.dtype == jnp.float32
    assert (float(pixels.min()), float(pixels.max())) == (0, 1)


@cache
def apart():
    """The small model with its layers unstacked."""
    graph = abstract_weights(CONFIG, jnp.float32, unrolled).graph
    arrays = flatten(weights().params)
    flat = {}
    for path, x in arrays.items():
        if path.startswith("trunk.layers."):
            flat |= {path.replace("layers", f"layers.{i}", 1): x[i] for i in range(len(x))}
        else:
            flat[path] = x
    abstract = abstract_weights(CONFIG, jnp.float32, unrolled)
    return F.Definition.of(fill(Weights(graph, abstract.params), flat), CONFIG, model().tokenizer)


def test_layers_apart():
    """A model whose layers are unstacked, as GPUs have it, computes something else."""
    definition, params = apart()
    contexts = F.contexts(definition, params, edit())
    for one, other in zip(jax.tree.leaves(contexts), jax.tree.leaves(edit_contexts()), strict=True):
        assert relative_error(one, other) < 1e-5
    v = F.velocity(definition, params, edit().initial_latent, 0.6, contexts.cond, edit().latent_grid)
    assert relative_error(v, velocity_of(edit_contexts())) < 1e-5


# ---- gradients


def drawn(seed, x):
    """Random numbers of a shape."""
    return jnp.asarray(np.random.RandomState(seed).standard_normal(np.shape(x)).astype(np.float32))


def check_slope(function, weigh, x, gradient, name="", step=1e-2, limit=1e-2):
    """A gradient along a random direction of the length of `x`, against differences at four points.

    `function` gives an array, whose sum weighted by `weigh`, taken in float64, is what was differentiated. An error is
    measured by what slopes along random directions usually are.
    """
    length = float(np.sqrt(np.mean(np.square(x))))
    direction = drawn(1, x) * length

    def at(distance):
        return float(np.sum(np.asarray(function(x + distance * direction), np.float64) * weigh))

    wanted = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
    gradient = np.asarray(gradient, np.float64)
    error = abs(np.vdot(gradient, direction) - wanted) / (np.linalg.norm(gradient) * length)
    assert error < limit, (name, error)
    print(f"{name}: {error:.1e}")


def test_gradients_by_latents_and_context():
    """Guidance, inversion or editing by gradients would go astray."""
    contexts, x = edit_contexts(), jnp.asarray(edit().initial_latent)
    weigh = drawn(0, x)
    by_x, by_contexts = jax.grad(lambda x, c: (velocity_of(c, x) * weigh).sum(), argnums=(0, 1))(x, contexts)
    check_slope(lambda x: velocity_of(contexts, x), weigh, x, by_x)
    assert not any(leaf.any() for leaf in jax.tree.leaves(by_contexts.distinct[1:]))
    for name in ("k", "v"):

        def changed(value, name=name):
            cond = dataclasses.replace(contexts.cond, **{name: value})
            return velocity_of(dataclasses.replace(contexts, distinct=(cond, *contexts.distinct[1:])))

        check_slope(changed, weigh, getattr(contexts.cond, name), getattr(by_contexts.cond, name), name)


@pytest.mark.slow
def test_gradients_by_parameters():
    """A parameter would be trained wrongly, or not at all: every one that training trains."""
    (definition, params), weigh = model().functional(), drawn(0, edit().initial_latent)

    @jax.jit
    def everything(params):
        contexts = F.contexts(definition, params, edit())
        v = F.velocity(definition, params, edit().initial_latent, 0.6, contexts.cond, edit().latent_grid)
        chances = F.log_prob(definition, params, edit(), ANSWER)
        return jnp.concatenate([v.ravel(), chances])

    weigh = np.concatenate([np.ravel(weigh), [1.0, -2.0, 3.0, -1.0]])
    gradients = jax.jit(jax.grad(lambda params: everything(params) @ weigh.astype(np.float32)))(params)
    trained = [path for path in params if not path.startswith("autoencoder.")]
    assert len(trained) > 60
    for path in trained:
        assert float(np.abs(gradients[path]).max()) > 0, path
        if path == "vit.layers.k.bias":  # on which nothing depends, but for rounding
            continue
        step = 3e-2 if path.startswith("vit") else 1e-2  # what the ViT changes is little, beside rounding
        check_slope(lambda x, p=path: everything(params | {p: x}), weigh, params[path], gradients[path], path, step)
    assert any(float(np.abs(gradients[path]).max()) > 0 for path in params if path.startswith("autoencoder.encoder"))


def test_gradients_through_denoising():
    """An image could not be moved by its noise, or by its context."""
    (definition, params), contexts = model().functional(), edit_contexts()
    guidance = F.cfg(2.0, 1.5, interval=(0.5, 1.0), renorm_type="text_channel")
    x = jnp.asarray(edit().initial_latent)
    weigh = drawn(0, x)

    def image(x):
        points = F.timesteps(4, 3.0)
        return F.denoise(definition, params, x, contexts, edit().latent_grid, points, guidance=guidance)

    check_slope(image, weigh, x, jax.grad(lambda x: (image(x) * weigh).sum())(x))


def test_forward_and_reverse_agree():
    """Forward mode, as for a distance between prompts, gives another derivative."""
    x, contexts = jnp.asarray(edit().initial_latent), edit_contexts()
    (_, params), weigh = model().functional(), drawn(0, edit().initial_latent)
    trained = {path: x for path, x in params.items() if path.startswith(("trunk.layers", "latent_in"))}

    def moved(x, contexts, some):
        return velocity_of(contexts, x, params | some)

    arguments = x, contexts, trained
    directions = jax.tree.map(partial(drawn, 3), arguments)
    _, forward = jax.jvp(moved, arguments, directions)
    _, back = jax.vjp(moved, *arguments)
    pairs = zip(jax.tree.leaves(back(weigh)), jax.tree.leaves(directions), strict=True)
    reverse = sum(np.vdot(np.asarray(a, np.float64), b) for a, b in pairs)
    assert float(np.vdot(np.asarray(forward, np.float64), weigh)) == pytest.approx(reverse, rel=1e-4)


def test_vectorised_and_compiled():
    """Many latents at once, or a program of it, give other numbers."""
    contexts, many = edit_contexts(), drawn(0, np.zeros((3, *edit().initial_latent.shape)))
    together = jax.jit(jax.vmap(lambda x: velocity_of(contexts, x)))(many)
    for x, v in zip(many, together, strict=True):
        assert relative_error(v, velocity_of(contexts, x)) < 1e-5
    times = jnp.asarray([0.2, 1.0])
    by_time = jax.vmap(lambda t: velocity_of(contexts, many[0], t=t))(times)
    assert relative_error(by_time[1], velocity_of(contexts, many[0], t=1.0)) < 1e-5


SHARDED = """
import sys
import bagel_jax
assert "jax" not in sys.modules, "import bagel_jax brings jax along"
F = bagel_jax.functional
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from small import model, random_image
from bagel_jax import Request
from bagel_jax.placement.rules import sharding

definition, params = model().functional()
prepared = model().prepare(Request.create("img2img", "a red bench", random_image()))
grid, x = prepared.latent_grid, prepared.initial_latent
mesh = Mesh(np.asarray(jax.devices()), ("tensor",))
rules = {"embed": None, "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
cut = {path: jax.device_put(value, sharding(path, value.shape, mesh, rules)) for path, value in params.items()}
q = cut["trunk.layers.und.q.kernel"]
assert len(q.devices()) == 2 and q.addressable_shards[0].data.shape[-2] * 2 == q.shape[-2]

def loss(params, x):
    contexts = F.contexts(definition, params, prepared)
    v = F.velocity(definition, params, x, 0.6, contexts.cond, grid)
    return (v**2).sum(), v

run = jax.jit(jax.value_and_grad(loss, has_aux=True))
(_, v), gradients = run(params, x)
(_, v2), gradients2 = run(cut, jax.device_put(x, NamedSharding(mesh, P("tensor"))))
assert np.linalg.norm(v - np.asarray(v2)) < 1e-5 * np.linalg.norm(v)
for path, wanted in gradients.items():
    error = np.linalg.norm(wanted - np.asarray(gradients2[path]))
    assert error <= 1e-4 * np.linalg.norm(wanted) + 1e-5, (path, error)
"""


@pytest.mark.slow
def test_sharded():
    """On two devices, heads and latents cut, it is another model. (Nor may importing the package wait for jax.)"""
    tests = str(Path(__file__).parent)
    script = f"import sys; sys.path.insert(0, {tests!r})\n{SHARDED}"
    ran = process("-c", script, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert ran.returncode == 0, ran.stderr[-3000:]


# ---- what may be put in


class Spy:
    """A hook that notes which layers call it with which shapes, and changes one thing in the second layer."""

    def __init__(self, change=None):
        self.change, self.seen = change, []

    def __call__(self, layer, *values):
        jax.debug.callback(lambda layer: self.seen.append((int(layer), *(x.shape for x in values))), layer)
        if self.change is None:
            return None
        return tuple(
            jnp.where(layer == 1, 0.5 * x, x) if number == self.change else x for number, x in enumerate(values)
        )


@pytest.mark.parametrize("stacked", [True, False])
def test_hooks_see_and_change_every_layer(stacked):
    """A probe misses a layer or a token, or what it puts in their place is not used."""
    (definition, params), spy = (model().functional() if stacked else apart()), Spy()
    contexts, grid, x = edit_contexts(), edit().latent_grid, edit().initial_latent
    run = partial(F.velocity, definition, params, x, 0.6, contexts.cond, grid)
    plain = run()
    np.testing.assert_allclose(run(hook=spy), plain, rtol=1e-4, atol=1e-5)
    jax.effects_barrier()
    c, tokens = CONFIG.trunk, len(x) + 2
    keys = (tokens, c.num_kv_heads, c.head_dim)
    shapes = (tokens, c.num_heads, c.head_dim), keys, keys, (tokens, c.hidden_size)
    assert sorted(spy.seen) == [(layer, *shapes) for layer in range(c.num_layers)]
    changed = [run(hook=Spy(change)) for change in range(4)]
    for i, one in enumerate([plain, *changed]):
        for other in changed[i:]:
            assert relative_error(other, one) > 1e-4


def test_hooks_see_contexts_and_answers():
    """A probe of a prompt or an answer sees other tokens than those: their places are those of the layout."""
    spy, (definition, params) = Spy(), model().functional()
    prepared = model().prepare(Request.create("text2text", "what?"))
    F.logits(definition, params, prepared, ANSWER, hook=spy)
    jax.effects_barrier()
    counts = [shape[0] for _, _, _, _, shape in spy.seen]
    assert sorted(counts) == sorted(CONFIG.trunk.num_layers * [prepared.plan.cond.length, len(ANSWER) + 1])

    kept = []

    def keep(layer, q, k, v, hidden):
        jax.debug.callback(lambda layer, k: kept.append((int(layer), k)), layer, k)

    # Images' tokens go through two experts, and lie between those of texts all the same.
    contexts = F.contexts(definition, params, edit(), hook=keep)
    jax.effects_barrier()
    for layer, k in kept:
        if len(k) == contexts.cond.k.shape[1]:
            np.testing.assert_allclose(k, contexts.cond.k[layer], rtol=1e-4, atol=1e-5)


def test_branches_that_are_off_are_not_computed():
    """Every step costs as much as a guided one; or a branch gets into the image while it is off."""
    (definition, params), contexts = model().functional(), edit_contexts()
    poisoned = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), contexts.distinct[1:])
    dirty = dataclasses.replace(contexts, distinct=(contexts.cond, *poisoned))

    def finite(**settings):
        points = F.timesteps(3, 1.0)  # evaluations at 1 and 0.5
        arguments = edit().initial_latent, dirty, edit().latent_grid, points
        return bool(jnp.isfinite(F.denoise(definition, params, *arguments, guidance=F.cfg(**settings))).all())

    assert finite(text_scale=1.0)
    assert finite(interval=(0.0, 0.4))
    assert not finite(interval=(0.0, 0.5))


def test_solvers_from_outside():
    """A solver cannot ask for the velocity at another timestep."""
    (definition, params), heun = model().functional(), example("heun").heun
    assert len(inspect.getsource(heun).splitlines()) < 15
    start = edit().initial_latent, edit_contexts(), edit().latent_grid
    run = partial(F.denoise, definition, params, *start, guidance=F.cfg(2.0, 1.0, interval=(0.0, 1.0)))
    exact = run(F.timesteps(129, 1.0), solver=heun)
    assert relative_error(run(F.timesteps(17, 1.0), solver=heun), exact) < 0.5 * relative_error(
        run(F.timesteps(33, 1.0)), exact
    )


def test_guidance_from_outside():
    """A guidance that keeps a state loses it, or is told other velocities."""
    (definition, params), APG = model().functional(), example("apg").APG
    methods = APG.init, APG.needs, APG.__call__
    assert sum(len(inspect.getsource(method).splitlines()) for method in methods) < 15
    start = edit().initial_latent, edit_contexts(), edit().latent_grid
    run = partial(F.denoise, definition, params, *start, F.timesteps(6, 3.0))
    plain = run(guidance=F.cfg(3.0, 1.0, interval=(0.0, 1.0), renorm_min=1.0))
    assert relative_error(run(guidance=APG(3.0, along=1.0, radius=np.inf, momentum=0.0)), plain) < 1e-5
    first = run(guidance=APG(3.0, radius=np.inf, momentum=0.0))
    assert relative_error(first, plain) > 1e-3
    assert relative_error(run(guidance=APG(3.0, radius=np.inf)), first) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heun", "apg"])
def test_examples_run(name, capsys):
    """A person's first try of the page ends in an error."""
    example(name).main()
    assert len(capsys.readouterr().out.splitlines()) >= 5


def test_bad_input():
    """A mistake gives an image all the same, of something else."""
    (definition, params), contexts = model().functional(), edit_contexts()
    x, grid = edit().initial_latent, edit().latent_grid
    think = model().prepare(Request.create("text2img", "a clock", think=True))
    velocity = partial(F.velocity, definition, params)
    for message, run in (
        ("x has shape", lambda: velocity(x[1:], 0.5, contexts.cond, grid)),
        ("grid is", lambda: velocity(x, 0.5, contexts.cond, (1, len(x)))),
        ("x has shape", lambda: F.decode(definition, params, x.T, grid)),
        ("x has shape", lambda: F.denoise(definition, params, x[1:], contexts, grid, F.timesteps(3))),
        ("thought is None", lambda: F.contexts(definition, params, think)),
        ("thought is 'a'", lambda: F.contexts(definition, params, edit(), thought="a")),
        ("token ids", lambda: F.logits(definition, params, edit(), [10**6])),
        ("steps is 1", lambda: F.timesteps(1)),
        ("cfg_renorm_type", lambda: F.cfg(renorm_type="none")),
    ):
        with pytest.raises(InputError, match=message):
            run()


def test_definitions_are_equal():
    """Every function of the page is compiled anew whenever a model is taken apart."""
    (one, params), (other, _) = model().functional(), model().functional()
    assert one == other
    assert hash(one) == hash(other)
    assert set(params) == set(one.paths) == set(flatten(weights().params))
    assert one != apart()[0]
