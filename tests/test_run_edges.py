"""The command line where options meet each other, the disk, or a tokenizer that is not the model's."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from commands import Cli
from safetensors.numpy import load_file, save_file

from bagel_jax.bagel import Bagel
from bagel_jax.errors import InputError

SMALL = ("--height", 64, "--width", 64, "--steps", 2)


@pytest.fixture
def cli(tiny_dir, tmp_path, capsys) -> Cli:
    return Cli(tiny_dir, tmp_path, capsys)


def test_options_given_twice(cli):
    """REGRESSION 34, 36: the prompts of the first --prompts would be dropped without a word."""
    ran = cli("text2img", *SMALL, "--prompts", "a", "--prompts", "b", "c")
    assert [record["prompt"] for record in ran.records] == ["a", "b", "c"]


def test_output_folder_that_cannot_be_made(tiny_dir, tmp_path, capsys, monkeypatch):
    """The weights would be loaded for a folder that cannot be written to."""
    monkeypatch.setattr(Bagel, "load_weights", lambda *_: pytest.fail("weights were loaded"))
    (tmp_path / "results.jsonl").mkdir()
    cli = Cli(tiny_dir, tmp_path, capsys)
    ran = cli("text2img", *SMALL, "--prompts", "a", "--output", tmp_path)
    assert ran.code == 2
    assert ran.err.startswith("error: --output ")
    assert ran.err.endswith("give another folder\n")


def test_bad_requests_are_told_before_the_weights_are_loaded(cli, cases_dir, tmp_path, monkeypatch, capsys):
    """Somebody would wait for 29 GB to load before hearing of a typing error."""
    said = []
    load = Bagel.load_weights
    monkeypatch.setattr(Bagel, "load_weights", lambda *args: said.append(capsys.readouterr().err) or load(*args))
    paths = cases_dir / "img2img_in0.png", tmp_path / "nowhere.png"
    ran = cli("img2text", "--max-tokens", 1, "--prompts", "a", "b", "--image-path", *paths)
    assert ran.code == 2
    assert "nowhere.png does not exist" in said[0]
    assert ran.records[0]["text"] == ""  # one decoding step: only <|im_start|>, as in the official code
    assert "nowhere.png does not exist" in ran.records[1]["error"]


def test_quiet_runs_all_steps_in_one_call(cli, monkeypatch):
    """A batch job would wait for the host after every step for a bar that nobody sees."""
    seen = []
    run = Bagel.run_many
    monkeypatch.setattr(Bagel, "run_many", lambda self, p, bars: seen.append(bars) or run(self, p, bars))
    assert cli("text2img", *SMALL, "--quiet", "--prompts", "a").code == 0
    assert seen == [None]


def test_tokenizer_of_another_model(tiny_dir, tmp_path):
    """Markers that the embedding has no rows for would give answers like "!!!!", and no error."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_dir, directory)
    tensors = load_file(directory / "ema.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[name] = np.ascontiguousarray(tensors[name][:703])
    save_file(tensors, directory / "ema.safetensors")
    config = json.loads((directory / "llm_config.json").read_text())
    (directory / "llm_config.json").write_text(json.dumps(config | {"vocab_size": 703}))
    with pytest.raises(InputError, match="has token 704, but the model has 703 tokens"):
        Bagel.open(directory)
