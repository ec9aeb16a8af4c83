"""The two stages in a row: a request in, a result out.

The only room that knows both stages. This engine serves one request at a time on one device.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bagel_jax.ar.stage import ContextStage, fitted
from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.config import BagelConfig
from bagel_jax.demo.example import MODEL
from bagel_jax.diffusion.guidance import guidance
from bagel_jax.diffusion.loop import Canvas, DenoiseState, decode_latents, denoise
from bagel_jax.diffusion.schedule import schedule
from bagel_jax.errors import InputError
from bagel_jax.handoff import ContextKV
from bagel_jax.inputs.pictures import to_image
from bagel_jax.inputs.plan import Placed, Text, View
from bagel_jax.inputs.prepare import Prepared, latent_positions, prepare
from bagel_jax.inputs.tokenizer import Tokenizer
from bagel_jax.models.weights import Weights
from bagel_jax.request import Request, Result

# Called as progress(phase, done, total); phase is "load", "decode" or "denoise". done = 0 comes before the work.
Progress = Callable[[str, int, int], None]

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
    requests can be found with `prepare` before the weights are loaded.
    """

    def __init__(self, source: ModelSource, dtype: str = "auto"):
        keep_compiled_programs()
        self.dtype = resolve_dtype(dtype)
        self.config: BagelConfig = source.config
        self.tokenizer = Tokenizer(source.directory)
        markers = self.tokenizer.vision_start, self.tokenizer.vision_end
        if max(markers) >= self.config.trunk.vocab_size:
            raise InputError(
                f"the tokenizer in {source.directory} has token {max(markers)}, but the model has "
                f"{self.config.trunk.vocab_size} tokens; the tokenizer must be the model's own"
            )
        self.load_seconds: float | None = None
        self._source = source
        self._weights: Weights | None = None

    @classmethod
    def open(cls, directory: str | Path | None = None, dtype: str = "auto") -> Bagel:
        """A model whose weights are checked but not loaded yet.

        Args:
            directory: a checkpoint in the published layout, or one that `scripts/convert_weights.py` wrote; None: the
                bundled demo model.
            dtype: `auto`, `float32` or `bfloat16`.

        Raises:
            InputError: the directory does not hold a whole checkpoint, or a tokenizer that is not its own.
        """
        return cls(ModelSource.open(MODEL if directory is None else Path(directory)), dtype)

    @classmethod
    def load(cls, directory: str | Path | None = None, dtype: str = "auto", progress: Progress | None = None) -> Bagel:
        """`open`, then the weights."""
        model = cls.open(directory, dtype)
        model.load_weights(progress)
        return model

    def load_weights(self, progress: Progress | None = None) -> Weights:
        """Loads the weights, unless they are loaded."""
        if self._weights is None:
            started = time.perf_counter()
            report = None if progress is None else partial(progress, "load")
            self._weights = jax.block_until_ready(self._source.load(self.dtype, report))
            self.load_seconds = time.perf_counter() - started
        return self._weights

    def prepare(self, request: Request) -> Prepared:
        """Plans a request on the host.

        Raises:
            InputError: this model cannot do it.
        """
        return prepare(request, self.config, self.tokenizer)

    def generate(self, modality: str, *args: Any, progress: Progress | None = None, **kwargs: Any) -> Result:
        """A request made from the arguments (see `Request.create`), answered.

        Raises:
            InputError: the request cannot be done.
        """
        return self.run(self.prepare(Request.create(modality, *args, **kwargs)), progress)

    def run(self, prepared: Prepared, progress: Progress | None = None) -> Result:
        """Answers a prepared request.

        Args:
            prepared: from `prepare`.
            progress: called as `progress(phase, done, total)`.

        Raises:
            FloatingPointError: the latents are not finite.
        """
        self.load_weights(progress)
        clock = _Clock()
        request, plan = prepared.request, prepared.plan
        result = Result(request.request_id, request.modality, notes=prepared.notes)
        stage = ContextStage(self._weights, self.config, self.dtype, self.tokenizer)
        with clock.phase("prefill"):
            caches = jax.block_until_ready(stage.prefill(prepared))
        main = plan.main
        if request.think or not request.makes_picture:
            with clock.phase("decode"):
                result.text, caches[0] = self._decode(stage, caches[0], main, request, progress)
        if request.makes_picture:
            if request.think:
                with clock.phase("prefill"):
                    thought = Placed(Text(self.tokenizer.prompt(result.text)), main.length, main.rope)
                    caches[0] = jax.block_until_ready(stage.extend(caches[0], thought, prepared))
                main = View(0, thought.kv_end, main.rope + thought.segment.rope_advance)
            context = hand_over(caches, main, plan.text, plan.img)
            with clock.phase("denoise"):
                latents = self._denoise(prepared, context, progress)
                result.latents = np.asarray(latents)
            if not np.isfinite(result.latents).all():
                raise FloatingPointError("the latents are not finite; the weights or the settings are unusable")
            with clock.phase("pixels"):
                weights = self._weights
                pixels = decode_latents(weights.graph, weights.params, latents, prepared.latent_grid)
                result.image = to_image(np.asarray(pixels))
        result.seconds = {"load": self.load_seconds, **clock.seconds}
        return result

    def _decode(self, stage, cache, main, request, progress):
        s = request.settings
        limit = s.max_think_tokens if request.makes_picture else s.max_tokens
        report = None if progress is None else partial(progress, "decode")
        sampling = stage.sampling(request.seed, s.do_sample, s.text_temperature)
        ids, cache = stage.decode(cache, main.length, main.rope, limit, sampling, report)
        return self.tokenizer.answer(ids), cache

    def _denoise(self, prepared, context, progress):
        s = prepared.request.settings
        evaluations = s.steps - 1
        canvas = Canvas(
            jnp.asarray(latent_positions(prepared.latent_grid, self.config)),
            jnp.asarray([self.tokenizer.vision_start, self.tokenizer.vision_end], jnp.int32),
        )
        steps = jax.tree.map(jnp.asarray, schedule(s.steps, s.timestep_shift, s.cfg_interval))
        g = guidance(s.cfg_text_scale, s.cfg_img_scale, s.cfg_renorm_type, s.cfg_renorm_min)
        state = self._weights.place(DenoiseState(jnp.array(prepared.initial_latent), jnp.int32(0)))
        # All steps in one call, unless somebody watches.
        stops = [evaluations] if progress is None else range(1, evaluations + 1)
        if progress is not None:
            progress("denoise", 0, evaluations)
        for stop in stops:
            state = denoise(
                self._weights.graph, self._weights.params, state, jnp.int32(stop), steps, canvas, context, g
            )
            if progress is not None:
                jax.block_until_ready(state)
                progress("denoise", stop, evaluations)
        return state.latents


def hand_over(caches, main: View, text: View, img: View) -> ContextKV:
    """The contexts of the guidance branches; branches that see the same become one row."""
    views = list(dict.fromkeys((main, text, img)))
    used = sorted({view.cache for view in views})
    longest = [max(view.length for view in views if view.cache == cache) for cache in used]
    return ContextKV(
        caches=tuple(fitted(caches[cache], length) for cache, length in zip(used, longest, strict=True)),
        length=jnp.asarray([view.length for view in views], jnp.int32),
        rope=jnp.asarray([view.rope for view in views], jnp.int32),
        rows=tuple(used.index(view.cache) for view in views),
        text_row=views.index(text),
        img_row=views.index(img),
    )


_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
# Start and end of each stretch of compiling in this process, by time.perf_counter().
_compiling: list[tuple[float, float]] = []


def _note_compiling(event: str, seconds: float, **_: Any) -> None:
    if event in _COMPILE_EVENTS:
        end = time.perf_counter()
        # Tracing a function traces those it calls; theirs were noted first and lie within.
        while _compiling and _compiling[-1][0] >= end - seconds:
            _compiling.pop()
        _compiling.append((end - seconds, end))


jax.monitoring.register_event_duration_secs_listener(_note_compiling)


class _Clock:
    """Seconds by phase; time that goes into compiling is counted apart, as a phase of its own."""

    def __init__(self):
        self.seconds = {"compile": 0.0}

    @contextmanager
    def phase(self, name: str):
        """Times the work inside, which must have finished on the device when it ends."""
        _compiling.clear()
        started = time.perf_counter()
        yield
        compiling = sum(end - start for start, end in _compiling if start >= started)
        self.seconds["compile"] += compiling
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started - compiling
