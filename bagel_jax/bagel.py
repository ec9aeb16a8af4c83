"""A BAGEL model to talk to: what `from bagel_jax import Bagel` gives."""

from __future__ import annotations

import functools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.config import BagelConfig
from bagel_jax.demo.example import MODEL
from bagel_jax.engine.core import Engine
from bagel_jax.engine.drivers import lockstep
from bagel_jax.engine.drivers.driver import Driver
from bagel_jax.engine.drivers.threads import ThreadDriver
from bagel_jax.engine.handle import Handle
from bagel_jax.engine.handoff import ContextKV
from bagel_jax.engine.outlook import Outlook, outlook
from bagel_jax.engine.precompile import precompile
from bagel_jax.engine.session import Session
from bagel_jax.engine.ticket import Done, Event, Progress, TextDelta
from bagel_jax.errors import InputError
from bagel_jax.functional import Definition
from bagel_jax.inputs.prepare import Prepared, check, prepare
from bagel_jax.inputs.tokenizer import Tokenizer
from bagel_jax.models.weights import Weights
from bagel_jax.placement.placement import Placement, stage_placements
from bagel_jax.request import Request, Result, image_size
from bagel_jax.settings import EngineConfig

# Called as report(phase, done, total); phase is "load", "compile", "decode" or "denoise". done = 0 comes before work.
Report = Callable[[str, int, int], None]

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent cache of compiled programs, unless the user has set one up (or off) already."""
    if jax.config.jax_compilation_cache_dir is None and jax.config.jax_enable_compilation_cache:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "bagel_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def resolve_dtype(name: str):
    """The jax dtype for `auto`, `float32` or `bfloat16`; auto is float32 on a CPU, where bfloat16 is slow.

    Raises:
        InputError: another name.
    """
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise InputError(f"dtype is {name!r}; it must be one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


class Bagel:
    """A BAGEL model that answers requests.

    `Bagel.load(DIR)` is the usual way; `Bagel.open(DIR)` reads and checks everything but the weights, so that bad
    requests can be found with `check` before the weights are loaded.
    """

    def __init__(self, source: ModelSource, dtype: str = "auto", settings: EngineConfig | None = None):
        keep_compiled_programs()
        self.dtype = resolve_dtype(dtype)
        self.config: BagelConfig = source.config
        self.tokenizer = Tokenizer(source.directory)
        markers = self.tokenizer.special.markers
        if max(markers) >= self.config.trunk.vocab_size:
            raise InputError(
                f"the tokenizer in {source.directory} has token {max(markers)}, but the model has "
                f"{self.config.trunk.vocab_size} tokens; the tokenizer must be the model's own"
            )
        self.load_seconds: float | None = None
        self.settings = settings or EngineConfig()
        self._check_precompile()
        self.placements: tuple[Placement, Placement] = stage_placements(self.settings, self.config, self.dtype)
        self._source = source
        self._first_use = threading.RLock()  # several threads may be the first
        self._weights: tuple[Weights, Weights] | None = None
        self._engine: Driver | None = None

    @classmethod
    def open(
        cls, directory: str | Path | None = None, dtype: str = "auto", settings: EngineConfig | None = None
    ) -> Bagel:
        """A model whose weights are checked but not loaded yet.

        Args:
            directory: a checkpoint in the published layout, or one that `scripts/convert_weights.py` wrote; None: the
                bundled demo model.
            dtype: `auto`, `float32` or `bfloat16`.
            settings: how many requests at once, pages of the KV cache and the like.

        Raises:
            InputError: the directory does not hold a whole checkpoint, or a tokenizer that is not its own.
        """
        return cls(ModelSource.open(MODEL if directory is None else Path(directory)), dtype, settings)

    @classmethod
    def load(
        cls,
        directory: str | Path | None = None,
        dtype: str = "auto",
        progress: Report | None = None,
        settings: EngineConfig | None = None,
    ) -> Bagel:
        """`open`, then the weights."""
        model = cls.open(directory, dtype, settings)
        model.load_weights(progress)
        return model

    @functools.cached_property
    def outlook(self) -> Outlook:
        """What the model will have on its devices, told from sizes alone; asked for before the weights are loaded.

        Raises:
            InputError: it does not fit them.
        """
        return outlook(self.placements, self.config, self.settings, self.dtype)

    def load_weights(self, progress: Report | None = None) -> tuple[Weights, Weights]:
        """Loads the weights onto the devices of the two stages, unless they are loaded.

        Raises:
            InputError: they do not fit; then nothing is read.
        """
        with self._first_use:
            if self._weights is None:
                _ = self.outlook
                started = time.perf_counter()
                report = None if progress is None else partial(progress, "load")
                context, denoise = self.placements
                weights = self._source.load(self.dtype, report, context.parameter)
                weights = jax.block_until_ready(weights.for_serving(self.config, self.dtype))
                again = weights if denoise.mesh == context.mesh else weights.on(denoise.parameter)
                self._weights = weights, jax.block_until_ready(again)
                self.load_seconds = time.perf_counter() - started
            return self._weights

    def follow(self) -> None:
        """What every process but the first does where there are several: its part, until process 0 closes.

        Raises:
            RuntimeError: process 0, or another one, is gone.
        """
        lockstep.follow(self._core(None))

    @property
    def engine(self) -> Driver:
        """The two stages at work; made, and the weights loaded, when first asked for."""
        return self.start()

    def start(self, progress: Report | None = None) -> Driver:
        """Loads the weights and compiles what the settings' `precompile` names, unless that is done.

        Raises:
            RuntimeError: this is not process 0 of several, which alone takes requests in; the others `follow`.
        """
        with self._first_use:
            if self._engine is None:
                several = self.placements[0].several_processes
                if several and jax.process_index():
                    raise RuntimeError("process 0 alone takes requests in; in the others call Bagel.follow()")
                core = self._core(progress)
                if several:
                    self._engine = lockstep.LockstepDriver(core, self.load_seconds)
                else:
                    by_turns = self.settings.topology == "single-stage"
                    self._engine = ThreadDriver(core, self.load_seconds, by_turns=by_turns)
            return self._engine

    def _core(self, progress: Report | None) -> Engine:
        weights = self.load_weights(progress)
        core = Engine(weights, self.placements, self.config, self.dtype, self.tokenizer, self.settings)
        if self.settings.precompile_sizes is not None:
            report = (lambda *_: None) if progress is None else partial(progress, "compile")
            precompile(core, self.settings.precompile_sizes, report)
        return core

    def check(self, request: Request) -> None:
        """Looks whether this model can do a request, at little cost: images are not decoded.

        Raises:
            InputError: it cannot.
        """
        check(request, self.config, self.tokenizer)

    def functional(self) -> tuple[Definition, dict[str, jax.Array]]:
        """What `bagel_jax.functional`'s functions take: what is static of the model, and its parameters by path."""
        return Definition.of(self.load_weights()[0], self.config, self.tokenizer)

    def prepare(self, request: Request) -> Prepared:
        """Plans a request on the host.

        Raises:
            InputError: this model cannot do it.
        """
        return prepare(request, self.config, self.tokenizer)

    def submit(self, request: Request | Prepared) -> Handle:
        """Takes a request in and returns at once; the handle tells of it, and cancels it.

        Raises:
            InputError: this model cannot do it, or its id is in work already.
        """
        return self.engine.submit(self._prepared(request))

    def generate(self, modality: str, *args: Any, progress: Report | None = None, **kwargs: Any) -> Result:
        """A request made from the arguments (see `Request.create`), answered.

        Raises:
            InputError: the request cannot be done.
        """
        return self.run(Request.create(modality, *args, **kwargs), progress)

    def run(self, request: Request | Prepared, progress: Report | None = None) -> Result:
        """Answers a request.

        Args:
            request: the request.
            progress: called as `progress(phase, done, total)`.

        Raises:
            InputError: this model cannot do it, or the KV cache is too small for it.
            FloatingPointError: the latents are not finite.
        """
        ((_, result),) = self.run_many([request], progress)
        if isinstance(result, Exception):
            raise result
        return result

    def run_many(
        self, requests: Iterable[Request | Prepared], progress: Report | None = None
    ) -> Iterator[tuple[Request, Result | Exception]]:
        """Answers requests, as many at once as the settings say, each as soon as it is done.

        Args:
            requests: read, and prepared if they are not, only as far as there is room.
            progress: called as `progress(phase, done, total)`; tokens and steps are counted over all requests in work.

        Yields:
            Each request with its result, or with what made it fail: the others go on.
        """
        engine, requests = self.start(progress), iter(requests)
        # So many that no stage has to wait for the other.
        room = self.settings.ar_max_num_seqs + self.settings.dit_max_num_seqs
        events: queue.SimpleQueue[tuple[Handle, Event]] = queue.SimpleQueue()
        counts = _Counts(progress)

        def sink(handle: Handle, event: Event) -> None:
            events.put((handle, event))

        work: dict[str, Handle] = {}
        more = True
        try:
            while more or work:
                while more and len(work) < room:
                    one = next(requests, None)
                    if one is None:
                        more = False
                        break
                    request = one.request if isinstance(one, Prepared) else one
                    try:
                        handle = engine.submit(self._prepared(one), sink=sink)
                    except Exception as error:  # whatever happens to one request, the others go on
                        yield request, error
                        continue
                    work[request.request_id] = handle
                    counts.begin(request)
                if not work:
                    continue
                handle, event = events.get()
                if isinstance(event, Done):
                    del work[handle.request_id]
                    counts.end(handle.request_id)
                    try:
                        outcome = handle.result()
                    except Exception as error:
                        outcome = error
                    yield handle.request, outcome
                else:
                    counts.note(handle.request_id, event)
        finally:  # whoever stops listening leaves nothing behind for the next
            for handle in work.values():
                handle.cancel()

    def context(self, request: Request | Prepared) -> ContextKV:
        """The context of a request for an image, which stage 1 can make it from, here (`denoise`) or elsewhere.

        Raises:
            InputError: the request makes no image, or cannot be done.
        """
        return self.engine.submit(self._prepared(request), only_context=True).result()

    def denoise(self, request: Request | Prepared, context: ContextKV) -> Result:
        """Makes a request's image from its context; the request is to have the context's request_id.

        The plan of think mode is part of the context, but the result has no text.

        Raises:
            InputError: the context is not this request's, or of a model of other sizes.
            FloatingPointError: the latents are not finite.
        """
        return self.engine.submit(self._prepared(request), context=context).result()

    def session(self, *, seed: int = 0, progress: Report | None = None) -> Session:
        """A conversation in which images are drawn, edited and asked about; see `Session`."""
        return Session(partial(self.run, progress=progress), seed=seed)

    def close(self) -> None:
        """Cancels what is in work and waits until it is gone."""
        if self._engine is not None:
            self._engine.close()

    def _check_precompile(self) -> None:
        """Raises `InputError` for sizes to compile for that the model cannot make."""
        sizes = self.settings.precompile_sizes
        for size in () if sizes in (None, "all") else sizes:
            try:
                image_size(self.config, *size)
            except InputError as error:
                raise InputError(f"precompile is {self.settings.precompile!r}, where {error}") from None

    def _prepared(self, request: Request | Prepared) -> Prepared:
        return request if isinstance(request, Prepared) else self.prepare(request)


class _Counts:
    """Tokens and steps of all requests so far, done and to do; of those that are over, however many, one number."""

    def __init__(self, report: Report | None):
        self._report = report
        self._counts: dict[str, dict[str, list[int]]] = {"decode": {}, "denoise": {}}
        self._over = {"decode": 0, "denoise": 0}

    def begin(self, request: Request) -> None:
        """A request is in work."""
        s = request.settings
        if request.think or not request.makes_image:
            limit = s.max_think_tokens if request.makes_image else s.max_tokens
            self._set("decode", request.request_id, 0, limit)

    def note(self, request_id: str, event: TextDelta | Progress) -> None:
        """Something of it was done."""
        if isinstance(event, TextDelta):
            done, limit = self._counts["decode"][request_id]
            self._set("decode", request_id, done + event.tokens, limit)
        else:
            self._set("denoise", request_id, event.done, event.total)

    def end(self, request_id: str) -> None:
        """Nothing more of it will be done."""
        for phase, counts in self._counts.items():
            self._over[phase] += counts.pop(request_id, (0, 0))[0]

    def _set(self, phase: str, request_id: str, done: int, total: int) -> None:
        self._counts[phase][request_id] = [done, total]
        if self._report is not None:
            done, total = (sum(column) for column in zip(*self._counts[phase].values(), strict=True))
            self._report(phase, self._over[phase] + done, self._over[phase] + total)
