"""What the command line leaves behind: images, `results.jsonl`, answers on standard output, and progress bars."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bagel_jax.errors import InputError
from bagel_jax.request import Request, Result


def output_folder(name: str) -> Path:
    """A folder for results, which need not be there yet.

    Raises:
        InputError: a file is in the way.
    """
    output = Path(name)
    nearest = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise InputError(f"--output {output} cannot be a folder, since {nearest} is a file; give another name")
    return output


class Results:
    """The results of a run, each written as soon as it is there; in the end all lines stand in order of requests.

    Args:
        output: the folder.
        count: how many requests there are.
        quiet: no bars, no notes.

    Raises:
        InputError: the folder cannot be written to.
    """

    def __init__(self, output: Path, count: int, *, quiet: bool):
        self._output, self._quiet = output, quiet
        self._records: list[dict[str, Any] | None] = [None] * count
        self._told = 0  # requests whose answers have been printed, in order
        self.bars = None if quiet else _Bars()
        self._path = output / "results.jsonl"
        try:
            output.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"--output {output} cannot be written to ({error.strerror}); give another folder"
            ) from None

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        if self.bars is not None:
            self.bars.close()
        sorted_file = self._path.with_suffix(".tmp")  # a whole file takes the place of a whole one
        sorted_file.write_text("".join(json_line(r) for r in self._records if r is not None), encoding="utf-8")
        sorted_file.replace(self._path)

    def say(self, message: str) -> None:
        """A line on standard error, below the bar."""
        if self.bars is not None:
            self.bars.close()
        print(message, file=sys.stderr, flush=True)

    def save(self, i: int, request: Request, result: Result, *, latents: bool) -> dict[str, Any]:
        """Writes what came of request i, and returns its part of results.jsonl."""
        name = f"output_{i}"
        record: dict[str, Any] = {"text": result.text, "image": None, "size": None}
        for note in () if self._quiet else result.notes:
            self.say(f"note: request {i}: {note}")
        if result.image is not None:
            record["image"] = f"{name}.png"
            record["size"] = {"height": result.image.height, "width": result.image.width}
            result.image.save(self._output / record["image"])
            if latents:
                np.save(self._output / f"{name}.latent.npy", result.latents)
            if not self._quiet:
                self.say(f"wrote {self._output / record['image']}")
        return record | told(request, result)

    def add(self, i: int, record: dict[str, Any]) -> None:
        """The line of request i. Answers are printed in order of requests, so one may wait for those before it."""
        self._records[i] = record
        self._file.write(json_line(record))
        self._file.flush()
        while self._told < len(self._records) and (record := self._records[self._told]) is not None:
            self._told += 1
            if record.get("text") is not None:
                if self.bars is not None:
                    self.bars.close()  # an answer mostly ends before its limit; the terminal's next line is for it
                _print_answer(record["text"])


def told(request: Request, result: Result) -> dict[str, Any]:
    """What a record tells of a request and its result beside what came of it."""
    return {
        "think": request.think,
        "negative_prompt": request.negative_prompt,
        "settings": request.applicable_settings(),
        "seconds": {phase: round(seconds, 4) for phase, seconds in result.seconds.items()},
        "time_to_first_token": _rounded(result.time_to_first_token),
        "tokens_per_second": _rounded(result.tokens_per_second),
        "prefilled_tokens": result.prefilled_tokens,
        "cached_prefix_tokens": result.cached_prefix_tokens,
        "decoded_tokens": result.decoded_tokens,
        "notes": list(result.notes),
    }


def json_line(record: dict[str, Any]) -> str:
    """A record as a line of a file, which can be written in UTF-8 whatever is in it: JSON has half letters."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(record) + "\n"
    return line


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _print_answer(text: str) -> None:
    """Prints a text; what the terminal cannot show is escaped, and nobody listening any more is no fault."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (stays open until the process ends)


# Title and unit of each phase's bar.
_PHASES = {
    "load": ("loading weights", "tensor"),
    "compile": ("compiling", "program"),
    "decode": ("decoding", "token"),
    "denoise": ("denoising", "step"),
}


class _Bars:
    """Progress bars on standard error, one a phase; a bar stands before the phase's first step is over."""

    def __init__(self):
        self._bars: dict[str, tqdm] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Shows that `done` of `total` are done in `phase`."""
        if phase not in self._bars:
            title, unit = _PHASES[phase]
            self._bars[phase] = tqdm(total=total, initial=done, desc=title, unit=unit, file=sys.stderr)
        bar = self._bars[phase]
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            self._bars.pop(phase).close()

    def close(self) -> None:
        """Ends the bars that there are."""
        while self._bars:
            self._bars.popitem()[1].close()
