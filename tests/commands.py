"""Calling the command line from tests: within this process where that is enough, else in one of its own."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from golden import Case
from PIL import Image

from bagel_jax.bagel import Bagel
from bagel_jax.run import main


@dataclass
class Ran:
    """What one call of the command line left behind."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def records(self) -> list[dict[str, Any]]:
        lines = (self.folder / "results.jsonl").read_text(encoding="utf-8").split("\n")
        assert lines[-1] == ""  # each line is ended, so the last one is whole
        return [json.loads(line) for line in lines[:-1]]

    def image(self, i: int = 0) -> np.ndarray:
        with Image.open(self.folder / f"output_{i}.png") as image:
            return np.asarray(image)

    def latents(self, i: int = 0) -> np.ndarray:
        return np.load(self.folder / f"output_{i}.latent.npy")


def assert_refused(ran: Ran, *parts: str) -> None:
    """Exit code 2, one sentence on stderr that names all `parts`, and nothing else anywhere."""
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert ran.err.endswith("\n")
    assert ran.err.count("\n") == 1
    for part in parts:
        assert part in ran.err
    assert not ran.folder.exists()


class Cli:
    """`cli(modality, *options)` calls `main` on one model; each call writes to a folder of its own."""

    def __init__(self, model: Path, folder: Path, capsys):
        self.model, self._folder, self._capsys, self._calls = model, folder, capsys, 0

    def __call__(self, modality: str, *options: Any) -> Ran:
        folder = self._folder / f"run{self._calls}"
        self._calls += 1
        start = "--model", self.model, "--modality", modality, "--output", folder, "--dtype", "float32"
        self._capsys.readouterr()
        try:
            code = main([str(x) for x in (*start, *options)])
        except SystemExit as stop:  # argparse
            code = stop.code
        return Ran(code, *self._capsys.readouterr(), folder)


def process(*args: Any, timeout: float = 300, **env: str | None) -> subprocess.CompletedProcess:
    """Python with arguments in a process of its own, with changes to its environment (None: unset)."""
    changed = {**os.environ, **{name: value for name, value in env.items() if value is not None}}
    for name in (name for name, value in env.items() if value is None):
        changed.pop(name, None)
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, env=changed, capture_output=True, encoding="utf-8", timeout=timeout, check=False)


def small_copy(model: Bagel, tokens: int = 4) -> Bagel:
    """The same weights with a limit of `tokens` latent tokens a side, so that input images are resized to little."""
    small = copy.copy(model)
    small.config = dataclasses.replace(model.config, max_latent_size=tokens)
    small._engine = None  # it knows the old limit
    return small


def golden_options(case: Case, folder: Path) -> list[Any]:
    """A golden case as options; its noise is written to `folder`."""
    p = case.spec["params"]
    images = [case.folder / item["image"] for item in case.spec["inputs"] if "image" in item]
    options: list[Any] = ["--prompts", *(item["text"] for item in case.spec["inputs"] if "text" in item)]
    options += ["--image-path", *images] if images else []
    options += ["--think"] if p["think"] else []
    if p["understanding_output"]:
        return [*options, "--max-tokens", p["max_think_token_n"]]
    np.savez(folder / "noise.npz", **case.noise)
    options += ["--init-noise", folder / "noise.npz", "--save-latents", "--steps", p["num_timesteps"]]
    for name in ("cfg_text_scale", "cfg_img_scale", "timestep_shift", "cfg_renorm_min", "cfg_renorm_type"):
        options += ["--" + name.replace("_", "-"), p[name]]
    options += ["--cfg-interval", *p["cfg_interval"]]
    if p["think"]:
        options += ["--max-think-tokens", p["max_think_token_n"]]
    if "image_shapes" in p:
        options += ["--height", p["image_shapes"][0], "--width", p["image_shapes"][1]]
    return options


def script_runner(script: Path, monkeypatch, capsys):
    """A function that runs a script's `main` in this process and returns exit code, stdout and stderr."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script.name, *map(str, args)])
        try:
            code = module.main()
        except SystemExit as end:  # argparse
            code = end.code
        return code, *capsys.readouterr()

    run.module = module
    return run
