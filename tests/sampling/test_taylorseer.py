"""TaylorSeer: which steps are computed, the expansion, and which views a request's steps need."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from denoising import ticket_of
from jax.experimental import io_callback
from small import model, random_image

from bagel_jax.engine.denoise import steps as loop
from bagel_jax.engine.denoise.jobs import DenoiseJob
from bagel_jax.engine.handoff import Lease, Views
from bagel_jax.request import Request
from bagel_jax.sampling.taylorseer import TaylorState, expand, update

SETTINGS = [(3, 6, 5), (3, 2, 5), (1, 3, 2), (2, 0, 1), (4, 1, 1), (5, 3, 3), (3, 9, 2), (7, 6, 50)]


class Official:
    """The official formulas for one branch, in float64 (`modeling/cache_utils/taylorseer.py`, written anew)."""

    def __init__(self, interval: int, order: int, first: int):
        self.interval, self.order, self.first = interval, order, first
        self.step, self.counter, self.activated = 0, 0, [0]
        self.factors: dict[int, np.ndarray] = {}

    def computes(self) -> bool:
        full = self.step < self.first or self.counter == self.interval - 1
        if full:
            self.counter = 0
            self.activated.append(self.step)
        else:
            self.counter += 1
        return full

    def advance(self, hidden) -> tuple[bool, np.ndarray]:
        """Whether the next step is computed, and what it gives; `hidden` is what computing it would give."""
        computed = self.computes()
        if computed:
            distance = self.activated[-1] - self.activated[-2]
            new = {0: np.asarray(hidden, np.float64)}
            for i in range(self.order):
                if i not in self.factors or self.step <= self.first - 2:
                    break
                new[i + 1] = (new[i] - self.factors[i]) / distance
            self.factors, out = new, new[0]
        else:
            x = self.step - self.activated[-1]
            out = sum(factor * x**i / math.factorial(i) for i, factor in self.factors.items())
        self.step += 1
        return computed, out


class Ours:
    """The same with `TaylorState`, `update` and `expand`, of a slot in which an earlier request's terms were left."""

    def __init__(self, interval: int, order: int, first: int, left: float = 0.0):
        self.branch, self.left, self.order = TaylorState(interval, order, first), left, order
        self.terms = None

    def advance(self, hidden) -> tuple[bool, np.ndarray]:
        branch, hidden = self.branch, jnp.asarray(hidden)
        if self.terms is None:
            self.terms = jnp.full((self.order + 1, *hidden.shape), self.left)
        computed = branch.computes
        if computed:
            about = np.asarray([branch.known], np.int32), np.asarray([branch.distance], np.float32)
            self.terms = update(self.terms[None], hidden[None], *about)[0]
            out = self.terms[0]
        else:
            out = expand(self.terms, jnp.float32(branch.distance))
        branch.take()
        return computed, np.asarray(out)


def test_the_official_schedule():
    """The first steps are forecast, or one is computed too early or too late after them."""
    branch = TaylorState(interval=3, order=6, first=5)
    computed = []
    for step in range(20):
        if branch.computes:
            computed.append(step)
        branch.take()
    assert computed == [0, 1, 2, 3, 4, 7, 10, 13, 16, 19]


@pytest.mark.parametrize("how", SETTINGS)
def test_schedule_for_other_settings(how):
    """An interval, an order or a number of first steps other than the official ones shifts the computed steps."""
    official, branch = Official(*how), TaylorState(*how)
    for _ in range(60):
        expected, _ = official.advance(np.zeros((1, 1)))
        assert branch.computes == expected
        if expected:
            known = len(official.factors) - 1
            assert branch.known == known
            assert branch.distance == official.activated[-1] - official.activated[-2]
        branch.take()


@pytest.mark.parametrize("how", SETTINGS)
def test_several_forecast_steps_at_once(how):
    """A call of several forecast steps leaves a request elsewhere than those steps one by one."""
    one, many = TaylorState(*how), TaylorState(*how)
    while many.step < 60:
        count = 1 if many.computes else many.steps_ahead
        assert count >= 1
        many.take(count)
        for _ in range(count):
            one.take()
        assert one == many


@pytest.mark.parametrize("how", SETTINGS)
def test_equals_the_official_formulas(how):
    """A wrong distance, factorial or difference: forecasts that are near the truth, but not the official ones."""
    random = np.random.RandomState(0)
    official, ours = Official(*how), Ours(*how)
    value = random.standard_normal((3, 4))
    forecast = 0
    for _ in range(24):
        value = 0.9 * value + 0.1 * random.standard_normal(value.shape)
        (computed, expected), (also, got) = official.advance(value), ours.advance(value.astype(np.float32))
        assert also == computed
        forecast += not computed
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert forecast or how[0] == 1 or how[2] >= 24


@pytest.mark.parametrize("how", [(1, 3, 4), (3, 6, 5), (4, 4, 2)])
def test_terms_of_an_earlier_request_do_not_matter(how):
    """A request in a used slot takes differences from what the last one left there, even from NaN."""
    random = np.random.RandomState(1)
    clean, used, poisoned = Ours(*how), Ours(*how, left=1e3), Ours(*how, left=np.nan)
    for _ in range(20):
        value = random.standard_normal((2, 3)).astype(np.float32)
        expected = clean.advance(value)[1]
        np.testing.assert_array_equal(used.advance(value)[1], expected)
        np.testing.assert_array_equal(poisoned.advance(value)[1], expected)


def test_a_line_is_forecast_exactly():
    """The slope is taken over the wrong number of steps, which between 4, 7 and 10 is not one."""
    for order in (1, 2, 6):
        ours = Ours(3, order, 5)
        for step in range(20):
            value = np.asarray([[2.0 - 0.5 * step, 3.0 * step]], np.float32)
            np.testing.assert_allclose(ours.advance(value)[1], value, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("order", [0, 1, 2, 3, 6])
def test_expand_is_exact_for_a_polynomial(order):
    """A factorial or a power is left out: with the true derivatives the expansion is the polynomial itself."""
    coefficients = np.random.RandomState(2).standard_normal(order + 1)
    polynomial = np.polynomial.Polynomial(coefficients)
    derivatives = [polynomial.deriv(i)(4.0) if i else polynomial(4.0) for i in range(order + 1)]
    terms = jnp.asarray(derivatives, jnp.float32)[:, None, None]
    for ahead in (1, 2, 5):
        got = float(expand(terms, jnp.float32(ahead))[0, 0])
        assert got == pytest.approx(polynomial(4.0 + ahead), rel=1e-4, abs=1e-3)


def test_update_gives_the_derivatives_of_a_polynomial_at_steps_of_one():
    """Differences of differences are taken of the wrong terms: the third ones of cubes are 3!."""
    order = 3
    terms = jnp.zeros((1, order + 1, 1, 1))
    for step in range(8):
        value = jnp.full((1, 1, 1), float(step**order))
        known = np.asarray([min(step, order)], np.int32)
        terms = update(terms, value, known, np.asarray([1], np.float32))
    assert float(terms[0, order, 0, 0]) == math.factorial(order)


def test_rows_have_distances_and_terms_of_their_own():
    """Requests at other steps beside each other get each other's distance or number of terms."""
    random = np.random.RandomState(3)
    terms, hidden = (random.standard_normal(shape).astype(np.float32) for shape in ((3, 4, 2, 2), (3, 2, 2)))
    known, distance = np.asarray([0, 2, 3], np.int32), np.asarray([1, 3, 2], np.float32)
    together = np.asarray(update(terms, hidden, known, distance))
    for i in range(3):
        mine = slice(i, i + 1)
        alone = update(terms[mine], hidden[mine], known[mine], distance[mine])
        np.testing.assert_array_equal(together[mine], alone)
        assert not together[i, known[i] + 1 :].any()
        assert together[i, 1 : known[i] + 1].all()
    ahead = np.asarray(expand(jnp.asarray(together), jnp.asarray(distance)))
    for i in range(3):
        np.testing.assert_allclose(ahead[i], expand(together[i], distance[i]), rtol=1e-6, atol=1e-6)


def request(modality: str = "img2img", **settings):
    """A prepared request with TaylorSeer."""
    image = random_image() if modality == "img2img" else None
    usual = {"taylorseer": True, "steps": 21, "timestep_shift": 1.0, "request_id": "seer"}
    return model().prepare(Request.create(modality, "a red bench", image, **usual | settings))


@pytest.fixture(scope="module")
def contexts():
    """What is known on the host of the contexts of an edit and of an image from a text; there are no pages."""
    made = {}
    for modality, sizes in (("img2img", {}), ("text2img", {"height": 32, "width": 32})):
        prepared = request(modality, **sizes)
        plan = prepared.plan
        views, prefixes = Views.of("seer", prepared.image_size, (plan.cond, plan.drop_text, plan.drop_image))
        made[modality] = Lease(None, views, [[2 * i, 2 * i + 1] for i in range(len(prefixes))])
    return made


def job_of(prepared, lease: Lease) -> DenoiseJob:
    """A request that has just been taken in."""
    return DenoiseJob.create(ticket_of(prepared), lease)


def calls(job: DenoiseJob) -> list[tuple[int, int, tuple[int, ...], tuple[int, ...]]]:
    """Of each call until a request is done: its first step, its steps, views that are on, views computed."""
    seen = []
    while job.done < job.total:
        count, views = job.steps_alike(), job.views_on()
        assert 1 <= count <= job.total - job.done
        for step in range(job.done, job.done + count):
            assert job.views_on(step) == views
        seen.append((job.done, count, views, job.computed(views)))
        job.take(count)
    return seen


def test_without_an_interval_all_views_are_computed_together(contexts):
    """Forecast steps are calls of one step each, or a call goes on over a step that must be computed."""
    seen = calls(job_of(request(cfg_interval=(0.0, 1.0)), contexts["img2img"]))
    computed = [first for first, _, _, views in seen if views]
    assert computed == [0, 1, 2, 3, 4, 7, 10, 13, 16, 19]
    assert all(views == (0, 1, 2) and mine in ((), views) for _, _, views, mine in seen)
    assert [(first, count) for first, count, _, mine in seen if not mine] == [(5, 2), (8, 2), (11, 2), (14, 2), (17, 2)]


def test_computed_views_equal_the_official_branches(contexts):
    """A branch that is off outside the interval counts on meanwhile; officially it stands still."""
    for interval in ((0.4, 1.0), (0.3, 0.8), (0.55, 0.56), (0.0, 0.5)):
        job = job_of(request(cfg_interval=interval), contexts["img2img"])
        official = {view: Official(3, 6, 5) for view in range(3)}
        expected = {}
        for step in range(job.total):
            on = job.views_on(step)
            assert on == ((0, 1, 2) if job.schedule.guided[step] else (0,))
            expected[step] = tuple(view for view in on if official[view].advance(np.zeros((1, 1)))[0])
        got = {}
        for first, count, _, mine in calls(job):
            got |= dict.fromkeys(range(first, first + count), mine)
            assert count == 1 or not mine
        assert got == expected


def test_without_taylorseer_calls_end_with_the_interval(contexts):
    """Steps in and out of the interval are one call, all with guidance or all without."""
    job = job_of(request(taylorseer=False, cfg_interval=(0.4, 0.8)), contexts["img2img"])
    guided = job.schedule.guided[:20]
    begins, ends = int(guided.argmax()), int(guided.argmax() + guided.sum())
    assert 0 < begins < ends < 20
    on = (0, 1, 2)
    assert calls(job) == [
        (0, begins, (0,), (0,)),
        (begins, ends - begins, on, on),
        (ends, 20 - ends, (0,), (0,)),
    ]


def test_a_branch_that_begins_later_has_a_view_of_its_own(contexts):
    """Text to image: the branch without images sees what the full one does, but is forecast at other steps."""
    context = contexts["text2img"]
    seen = context.views
    assert (len(seen.length), seen.drop_text, seen.drop_image) == (2, 1, 0)
    late = {"height": 32, "width": 32, "cfg_interval": (0.0, 0.8), "cfg_img_scale": 2.0}
    job = job_of(request("text2img", **late), context)
    assert job.views == (0, 1, 2)
    shown = [0, seen.drop_text, seen.drop_image]
    np.testing.assert_array_equal(job.length, seen.length[shown])
    np.testing.assert_array_equal(job.rope, seen.rope[shown])
    assert job.view_pages == [context.view_pages[view] for view in shown]
    seen = calls(job)
    main = [first for first, _, _, mine in seen if 0 in mine]
    img = [first for first, _, _, mine in seen if 2 in mine]
    begins = int(job.schedule.guided.argmax())
    assert begins > 0
    assert main == [0, 1, 2, 3, 4, 7, 10, 13, 16, 19]
    assert img == [step for step in (begins + x for x in (0, 1, 2, 3, 4, 7, 10, 13, 16, 19)) if step < 20]


@pytest.mark.parametrize("settings", [{"cfg_interval": (0.0, 1.0)}, {"cfg_interval": (0.0, 0.8), "taylorseer": False}])
def test_equal_views_are_shared_where_they_can_be(contexts, settings):
    """Branches that see the same are computed twice although they are at the same step."""
    settings = {"height": 32, "width": 32, "cfg_img_scale": 2.0} | settings
    job = job_of(request("text2img", **settings), contexts["text2img"])
    assert job.views == (0, 1, 0)
    assert all(len(views) <= 2 for _, _, views, _ in calls(job))


def test_restart(contexts):
    """After a device error a request goes on with the counts of the steps that were lost."""
    ticket = ticket_of(request())
    before = calls(DenoiseJob.create(ticket, contexts["img2img"]))
    assert calls(DenoiseJob.create(ticket, contexts["img2img"])) == before


def test_forecast_images_equal_the_official_formulas(monkeypatch):
    """The stage feeds the formulas with another step's distance, or adds a forecast to the wrong view's velocity."""
    how = {"taylorseer_interval": 3, "taylorseer_order": 2, "taylorseer_first": 2}
    forecast = request(steps=9, cfg_interval=(0.0, 0.9), timestep_shift=2.0, **how)
    ours = model().run(forecast)
    off = dataclasses.replace(
        forecast.request, settings=msgspec.structs.replace(forecast.request.settings, taylorseer=False)
    )
    official, real, evaluations = [Official(3, 2, 2) for _ in range(3)], loop.rows_hidden, []

    def replaced(hidden, views):
        """Every evaluation is computed here, and what the formulas make of it takes its place."""
        evaluations.append([int(view) for view in views])
        return np.stack([official[view].advance(x)[1] for x, view in zip(hidden, views, strict=True)]).astype(
            np.float32
        )

    def rows_hidden(*args):
        hidden, pages = real(*args)
        shape = jax.ShapeDtypeStruct(hidden.shape, hidden.dtype)
        return io_callback(replaced, shape, hidden, args[-1].view, ordered=True), pages

    denoise = loop.denoise.__wrapped__
    monkeypatch.setattr(loop, "rows_hidden", rows_hidden)
    monkeypatch.setattr(loop, "denoise", jax.jit(lambda *args: denoise(*args), static_argnums=0))  # compiled anew
    expected = model().run(dataclasses.replace(forecast, request=off))
    assert evaluations[0] == [0]
    assert evaluations[-1] == [0, 1, 2]
    assert len(evaluations) == 8
    np.testing.assert_allclose(ours.latents, expected.latents, rtol=1e-4, atol=1e-4)
