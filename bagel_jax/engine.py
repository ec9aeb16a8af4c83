"""The two stages in a row: a request in, a result out.

The only room that knows both stages. Stage 0 serves many requests at once; stage 1 still one after another.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bagel_jax.ar.stage import ContextStage, Failed, Finished, Tokens
from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.clock import Clock
from bagel_jax.config import BagelConfig
from bagel_jax.demo.example import MODEL
from bagel_jax.diffusion.guidance import guidance
from bagel_jax.diffusion.loop import Canvas, DenoiseState, decode_latents, denoise
from bagel_jax.diffusion.schedule import schedule
from bagel_jax.errors import InputError
from bagel_jax.inputs.pictures import to_image
from bagel_jax.inputs.prepare import Prepared, latent_positions, prepare
from bagel_jax.inputs.tokenizer import Tokenizer
from bagel_jax.models.weights import Weights
from bagel_jax.request import Request, Result
from bagel_jax.settings import ServingSettings

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

    def __init__(self, source: ModelSource, dtype: str = "auto", settings: ServingSettings | None = None):
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
        self.settings = settings or ServingSettings()
        self._source = source
        self._weights: Weights | None = None
        self._stage: ContextStage | None = None

    @classmethod
    def open(
        cls, directory: str | Path | None = None, dtype: str = "auto", settings: ServingSettings | None = None
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
        progress: Progress | None = None,
        settings: ServingSettings | None = None,
    ) -> Bagel:
        """`open`, then the weights."""
        model = cls.open(directory, dtype, settings)
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
            InputError: the KV cache is too small for it.
            FloatingPointError: the latents are not finite.
        """
        ((_, result),) = self.run_many([prepared], progress)
        if isinstance(result, Exception):
            raise result
        return result

    def run_many(
        self, requests: Iterable[Request | Prepared], progress: Progress | None = None
    ) -> Iterator[tuple[Request, Result | Exception]]:
        """Answers requests, as many at once as the settings say, each as soon as it is done.

        Args:
            requests: read, and prepared if they are not, only as far as there is room.
            progress: called as `progress(phase, done, total)`; tokens decoded are counted over all requests in work.

        Yields:
            Each request with its result, or with what made it fail: the others go on.
        """
        self.load_weights(progress)
        stage, requests = self._context_stage(), iter(requests)
        work: dict[str, Prepared] = {}
        counts: dict[str, tuple[int, int]] = {}  # tokens decoded, and the most there may be
        more = True
        try:
            while more or work:
                while more and len(work) < self.settings.max_num_seqs:
                    one = next(requests, None)
                    if one is None:
                        more = False
                        break
                    request = one.request if isinstance(one, Prepared) else one
                    try:
                        prepared = one if isinstance(one, Prepared) else self.prepare(one)
                        stage.submit(prepared)
                    except Exception as error:  # whatever happens to one request, the others go on
                        yield request, error
                        continue
                    work[request.request_id] = prepared
                    counts[request.request_id] = 0, _token_limit(request)
                    _report(progress, counts)
                if not work:
                    continue
                for event in stage.step():
                    key = event.request_id
                    if isinstance(event, Tokens):
                        counts[key] = counts[key][0] + len(event.ids), counts[key][1]
                        _report(progress, counts)
                        continue
                    counts.pop(key)
                    one = work.pop(key)
                    try:
                        yield one.request, self._answer(one, event, progress)
                    except Exception as error:
                        yield one.request, error
        finally:  # whoever stops listening leaves nothing behind for the next
            for key in work:
                stage.cancel(key)

    def _context_stage(self) -> ContextStage:
        if self._stage is None:
            self._stage = ContextStage(self._weights, self.config, self.dtype, self.tokenizer, self.settings)
        return self._stage

    def _answer(self, prepared: Prepared, event: Finished | Failed, progress) -> Result:
        """What becomes of a request that has left stage 0."""
        if isinstance(event, Failed):
            raise InputError(event.error)
        request, stats, clock = prepared.request, event.stats, Clock()
        for span in stats.spans:
            clock.add(*span)
        result = Result(request.request_id, request.modality, notes=prepared.notes)
        result.cached_prefix_tokens = stats.cached_tokens
        if event.ids is not None:
            result.text = self.tokenizer.answer(event.ids)
            result.time_to_first_token = stats.time_to_first_token
            result.tokens_per_second = stats.decoded_tokens / clock.seconds["decode"]
        if request.makes_picture:
            with clock.phase("denoise"):
                latents = self._denoise(prepared, event.context, progress)
                result.latents = np.asarray(latents)
            if not np.isfinite(result.latents).all():
                raise FloatingPointError("the latents are not finite; the weights or the settings are unusable")
            with clock.phase("pixels"):
                weights = self._weights
                pixels = decode_latents(weights.graph, weights.params, latents, prepared.latent_grid)
                result.image = to_image(np.asarray(pixels))
        result.seconds = {"load": self.load_seconds, **clock.seconds}
        return result

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


def _token_limit(request: Request) -> int:
    """Tokens that a request may decode."""
    if request.makes_picture:
        return request.settings.max_think_tokens if request.think else 0
    return request.settings.max_tokens


def _report(progress: Progress | None, counts: dict[str, tuple[int, int]]) -> None:
    done, total = (sum(column) for column in zip(*counts.values(), strict=True))
    if progress is not None and total:
        progress("decode", done, total)
