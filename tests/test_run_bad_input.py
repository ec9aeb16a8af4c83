"""What a person gave wrong: one sentence, exit code 2, no traceback, and no waiting for weights."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import Cli, assert_refused, process, small_copy
from PIL import Image, features
from safetensors.numpy import load_file, save_file

from bagel_jax.bagel import Bagel
from bagel_jax.engine.denoise import steps as loop

GOOD = ("--height", 96, "--width", 160, "--prompts", "a red bench")


@pytest.fixture
def cli(tiny_dir, tmp_path, capsys) -> Cli:
    return Cli(tiny_dir, tmp_path, capsys)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ((*GOOD, "--width", 100), ("width", "100", "multiple of 16")),
        ((*GOOD, "--height", 1040), ("height", "1040", "1024")),
        ((*GOOD, "--width", 0), ("width", "0", "at least 1")),
        ((*GOOD, "--steps", 1), ("steps", "1", "from 2 to")),
        ((*GOOD, "--steps", 0), ("steps", "0", "from 2 to")),
        ((*GOOD, "--steps", 1001), ("steps", "1001", "to 1000")),
        ((*GOOD, "--steps", "abc"), ("--steps", "abc", "int")),
        ((*GOOD, "--cfg-interval", 0.9, 0.1), ("cfg_interval", "0.9", "0.1", "LO must not be above HI")),
        ((*GOOD, "--cfg-interval", 0, 1.5), ("cfg_interval", "1.5", "from 0 to 1")),
        ((*GOOD, "--cfg-interval", 0.4), ("--cfg-interval", "2")),
        ((*GOOD, "--seed", -1), ("seed", "-1", "from 0 to 4294967295")),
        ((*GOOD, "--seed", 2**32), ("seed", "4294967296", "from 0 to 4294967295")),
        ((*GOOD, "second prompt", "--seed", 2**32 - 1), ("seed", "4294967296", "from 0 to 4294967295")),
        ((*GOOD, "--cfg-text-scale", "nan"), ("cfg_text_scale", "nan", "number")),
        ((*GOOD, "--cfg-img-scale", "inf"), ("cfg_img_scale", "inf", "number")),
        ((*GOOD, "--cfg-text-scale", -1), ("cfg_text_scale", "-1", "at least 0")),
        ((*GOOD, "--cfg-renorm-min", 2), ("cfg_renorm_min", "2", "from 0 to 1")),
        ((*GOOD, "--timestep-shift", 0), ("timestep_shift", "0", "above 0")),
        ((*GOOD, "--do-sample", "--text-temperature", 0), ("text_temperature", "0", "above 0")),
        ((*GOOD, "--max-tokens", 0), ("max_tokens", "0", "from 1 to 32768")),
        ((*GOOD, "--dtype", "half"), ("--dtype", "half", "float32", "bfloat16")),
        ((*GOOD, "--txt-prompts", "prompts.txt"), ("both", "--prompts", "--txt-prompts")),
        (GOOD[:4], ("neither", "--prompts", "--txt-prompts")),
        ((*GOOD[:4], "--prompts"), ("--prompts", "at least one")),
        ((*GOOD[:4], "--txt-prompts", "nowhere.txt"), ("--txt-prompts", "nowhere.txt", "No such file")),
        ((*GOOD, "--init-noise", "nowhere.npz"), ("--init-noise", "nowhere.npz", "No such file")),
    ],
)
def test_option_out_of_range(cli, options, parts):
    """A wrong value would end in a traceback, in a puzzle, or after the weights were read."""
    assert_refused(cli("text2img", *options), *parts)


@pytest.mark.usefixtures("no_weights")
def test_unknown_renorm_type(cli):
    """REGRESSION 14: a type that the sampler does not have would be accepted."""
    ran = cli("text2img", *GOOD, "--cfg-renorm-type", "local")
    assert_refused(ran, "cfg_renorm_type", "'local'", "global, channel, text_channel")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("modality", "options", "parts"),
    [
        ("text2img", (*GOOD, "--hieght", 64), ("--hieght 64", "--help")),
        ("text2img", (*GOOD, "--step", 4), ("--step 4", "--help")),  # no abbreviations
        ("text2img", (*GOOD, "--neg", "x"), ("--neg x", "--help")),
        ("text2video", GOOD, ("text2video", "text2img", "img2img", "img2text", "text2text")),
    ],
)
def test_unknown_options_dropped(cli, modality, options, parts):
    """REGRESSION 36: a mistyped option would be dropped, or taken for another one."""
    assert_refused(cli(modality, *options), *parts)


@pytest.mark.usefixtures("no_weights")
def test_edit_without_its_image(cli, cases_dir):
    """REGRESSION 35: an edit would quietly become a new image, or an image given would be left unused."""
    image = cases_dir / "img2img_in0.png"
    assert_refused(cli("img2img", "--prompts", "a blue dress"), "img2img", "image")
    assert_refused(cli("img2text", "--prompts", "what is it?"), "img2text", "image")
    assert_refused(cli("text2img", *GOOD, "--image-path", image), "text2img", "image", "img2img")
    assert_refused(cli("text2text", "--prompts", "why?", "--image-path", image), "text2text", "image", "img2text")


@pytest.mark.usefixtures("no_weights")
def test_images_neither_one_nor_one_a_prompt(cli, cases_dir):
    """Images would be paired with prompts by guessing."""
    image = cases_dir / "img2img_in0.png"
    ran = cli("img2text", "--prompts", "a", "b", "c", "--image-path", image, image)
    assert_refused(ran, "--image-path", "2 images", "3 prompts")


@pytest.mark.usefixtures("no_weights")
def test_unusable_images(cli, tmp_path):
    """A mistyped path or another file would end in a traceback of Pillow's."""
    (tmp_path / "notes.png").write_text("no image at all")
    for name, part in (("nowhere.png", "does not exist"), ("notes.png", "identify")):
        ran = cli("img2text", "--prompts", "what is it?", "--image-path", tmp_path / name)
        assert_refused(ran, str(tmp_path / name), part)
    assert_refused(cli("img2text", "--prompts", "what?", "--image-path", tmp_path), str(tmp_path))


@pytest.mark.usefixtures("no_weights")
def test_unusable_prompt_files(cli, tmp_path):
    """A file of prompts that is empty or in another encoding would end in a traceback or in nothing."""
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin1.txt").write_bytes("grün".encode("latin1"))
    assert_refused(cli("text2img", "--txt-prompts", tmp_path / "empty.txt"), "empty.txt", "no prompt")
    assert_refused(cli("text2img", "--txt-prompts", tmp_path / "latin1.txt"), "latin1.txt", "utf-8")


@pytest.mark.usefixtures("no_weights")
def test_prompt_that_is_no_text(cli):
    """A prompt in another encoding than the terminal's would end in a traceback of the tokenizer's."""
    assert_refused(cli("text2img", *GOOD[:4], "--prompts", os.fsdecode(b"gr\xfcn")), "prompt")


@pytest.mark.usefixtures("no_weights")
def test_noise_that_does_not_fit(cli, cases_dir, tmp_path):
    """Noise of another size would be broadcast, or end in an error about shapes deep inside."""
    file, latent = tmp_path / "noise.npz", np.zeros((60, 64), np.float32)
    for arrays, parts in (
        ({"latent": latent[:59]}, ("latent", "[59, 64]", "[60, 64]")),
        ({"other": latent}, ("no array latent", "[60, 64]")),
        ({"latent": np.full_like(latent, np.nan)}, ("latent", "not finite")),
    ):
        np.savez(file, **arrays)
        assert_refused(cli("text2img", *GOOD, "--init-noise", file), "init_noise", *parts)
    edit = "--prompts", "a blue dress", "--image-path", cases_dir / "img2img_in0.png"
    np.savez(file, latent=np.zeros((1216, 64)))
    assert_refused(cli("img2img", *edit, "--init-noise", file), "no array vae_0", "[1, 16, 64, 76]")
    np.savez(file, latent=np.zeros((1216, 64)), vae_0=np.zeros((1, 64, 76, 16)))
    assert_refused(cli("img2img", *edit, "--init-noise", file), "vae_0", "[1, 64, 76, 16]", "[1, 16, 64, 76]")


def _npz(path: Path, array) -> bytes:
    np.savez(path, latent=array)
    return path.read_bytes()


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("kind", ["text", "npy", "truncated", "damaged", "strings"])
def test_noise_file_of_another_kind(cli, tmp_path, kind):
    """A wrong file for --init-noise would end in a traceback."""
    file, latent = tmp_path / "noise.npz", np.ones((60, 64), np.float32)
    whole = _npz(file, latent)
    if kind == "text":
        file.write_text("no arrays at all")
    elif kind == "npy":
        with file.open("wb") as out:
            np.save(out, latent)
    elif kind == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
    elif kind == "damaged":
        file.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    else:
        _npz(file, np.full((60, 64), "x"))
    ran = cli("text2img", *GOOD, "--init-noise", file)
    assert_refused(ran, "noise")
    assert "unsafe" not in ran.err  # NumPy's advice about pickles is none to pass on


@pytest.mark.usefixtures("no_weights")
def test_output_is_a_file(cli, tmp_path):
    """The results of an hour could not be written at its end."""
    (tmp_path / "taken").write_text("mine")
    for name in ("taken", "taken/deeper"):
        ran = cli("text2img", *GOOD, "--output", tmp_path / name)
        assert_refused(ran, "--output", str(tmp_path / "taken"))
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.fixture
def broken(tiny_dir, tmp_path, cli) -> Path:
    """A copy of the small model to be damaged; the command line uses it."""
    cli.model = tmp_path / "model"
    shutil.copytree(tiny_dir, cli.model)
    return cli.model


@pytest.mark.usefixtures("no_weights")
def test_no_model(cli, tmp_path):
    """A mistyped --model would be looked up on the internet or end in a traceback."""
    cli.model = tmp_path / "nowhere"
    assert_refused(cli("text2img", *GOOD), "nowhere", "not a directory")
    cli.model = tmp_path / "empty"
    cli.model.mkdir()
    assert_refused(cli("text2img", *GOOD), "empty", "ema.safetensors")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors"])
def test_truncated_checkpoint(cli, broken, name):
    """A download that was cut short would be noticed late, or not at all."""
    whole = (broken / name).read_bytes()
    for length in (len(whole) - 1000, len(whole) // 2, 3):
        (broken / name).write_bytes(whole[:length])
        assert_refused(cli("text2img", *GOOD), str(broken / name))
    (broken / name).unlink()
    assert_refused(cli("text2img", *GOOD), name)


@pytest.mark.usefixtures("no_weights")
def test_checkpoint_with_other_tensors(cli, broken):
    """A model with a tensor missing, left over or of another shape would run and make noise."""
    name = "language_model.model.layers.1.self_attn.q_proj_moe_gen.weight"
    tensors = load_file(broken / "ema.safetensors")
    without = {key: value for key, value in tensors.items() if key != name}
    assert len(without) == len(tensors) - 1
    for changed, what in (
        (without, "missing"),
        (tensors | {"language_model.extra": tensors[name]}, "language_model.extra is unexpected"),
        (without | {name: tensors[name][:-1]}, "shape"),
    ):
        save_file(changed, broken / "ema.safetensors")
        assert_refused(cli("text2img", *GOOD), what, "extra" if "extra" in what else name)


@pytest.mark.usefixtures("no_weights")
def test_unusable_model_files(cli, broken):
    """A checkpoint without its tokenizer, or with a damaged json file, would end in a traceback."""
    (broken / "llm_config.json").write_text("{")
    assert_refused(cli("text2img", *GOOD), "llm_config.json", "json")
    (broken / "llm_config.json").unlink()
    assert_refused(cli("text2img", *GOOD), "llm_config.json", "does not exist")
    shutil.copy(Path(__file__).parent / "data" / "tiny-bagel" / "llm_config.json", broken)
    (broken / "tokenizer.json").write_text("{}")
    (broken / "vocab.json").write_text("[]")
    assert_refused(cli("text2img", *GOOD), "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (broken / name).unlink()
    assert_refused(cli("text2img", *GOOD), "tokenizer.json", "vocab.json")


def test_process_without_traceback(tiny_dir, tmp_path):
    """A shell script would see success, and a person a traceback."""
    (tmp_path / "notes.png").write_text("no image at all")
    options = "--modality", "img2text", "--prompts", "x", "--image-path", tmp_path / "notes.png"
    done = process("-m", "bagel_jax.run", "--model", tiny_dir, "--output", tmp_path / "out", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'notes.png'}")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def small(tiny, monkeypatch) -> None:
    """The command line gets the model that is loaded already, with input images resized to little."""
    monkeypatch.setattr(Bagel, "open", lambda *_: small_copy(tiny))


@pytest.mark.usefixtures("small")
def test_one_bad_image_among_three(cli, cases_dir, tmp_path):
    """One bad image would cost the answers about all others."""
    good = cases_dir / "img2img_in0.png"
    (tmp_path / "notes.png").write_text("no image at all")
    paths = good, tmp_path / "notes.png", good
    ran = cli("img2text", "--quiet", "--max-tokens", 4, "--prompts", "a", "b", "c", "--image-path", *paths)
    assert ran.code == 2
    assert ran.err.startswith("error: request 1: ")
    assert ran.err.count("\n") == 1
    assert str(paths[1]) in ran.err
    first, bad, last = ran.records
    assert [r["id"] for r in ran.records] == ["output_0", "output_1", "output_2"]
    assert str(paths[1]) in bad["error"]
    assert "text" not in bad
    assert "error" not in first | last
    assert [(r["prompt"], r["seed"]) for r in (first, last)] == [("a", 0), ("c", 2)]
    assert ran.out == first["text"] + "\n" + last["text"] + "\n"


def _half(path: Path, cases_dir: Path) -> None:
    whole = (cases_dir / "img2img_in0.png").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def _damaged_avif(path: Path, _) -> None:
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(buffer, "AVIF")
    whole = buffer.getvalue()
    start = whole.index(b"mdat") + 4
    path.write_bytes(whole[:start] + bytes(len(whole) - start))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "damage",
    [
        _half,
        # Pillow raises RuntimeError there.
        pytest.param(
            _damaged_avif, marks=pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
        ),
    ],
)
def test_damaged_image(cli, cases_dir, tmp_path, damage):
    """A broken download, which shows when it is decoded, would end in a traceback or cost the other answers."""
    good, bad = cases_dir / "img2img_in0.png", tmp_path / "damaged"
    damage(bad, cases_dir)
    options = "--quiet", "--max-tokens", 2, "--prompts", "a", "b", "c", "--image-path", good, bad, good
    ran = cli("img2text", *options)
    assert ran.code == 2
    assert ran.err.startswith(f"error: request 1 failed: {bad} cannot be read as an image")
    assert ran.err.count("\n") == 1
    assert ["error" in record for record in ran.records] == [False, True, False]
    assert str(bad) in ran.records[1]["error"]


@pytest.mark.parametrize("crashes", [False, True], ids=["not finite", "the device fails"])
def test_request_that_fails_while_it_runs(cli, tiny, monkeypatch, crashes):
    """One failure would cost the images of all others, or would look like success."""
    prepare, denoise = Bagel.prepare, loop.denoise
    said = "the device is out of memory" if crashes else "the latents are not finite"

    def spoiled(self, request):
        made = prepare(self, request)
        return dataclasses.replace(made, initial_latent=made.initial_latent * np.nan) if request.seed == 1 else made

    def crashing(static, params, state, batch, *args):
        if np.isnan(state.latents[batch.active]).any():  # not what an earlier request left in its slot
            raise RuntimeError(said)
        return denoise(static, params, state, batch, *args)

    monkeypatch.setattr(Bagel, "prepare", spoiled)
    if crashes:
        monkeypatch.setattr(loop, "denoise", crashing)
    monkeypatch.setattr(Bagel, "open", lambda *_: tiny)
    size = "--height", 96, "--width", 160, "--steps", 2
    ran = cli("text2img", *size, "--quiet", "--prompts", "a", "b", "c")
    assert ran.code == 1
    assert re.fullmatch(f"error: request 1 failed: {said}.*\n", ran.err)
    assert ["error" in record for record in ran.records] == [False, True, False]
    assert said in ran.records[1]["error"]
    assert sorted(path.name for path in ran.folder.glob("*.png")) == ["output_0.png", "output_2.png"]


@pytest.mark.usefixtures("small")
def test_answer_that_the_terminal_cannot_show(cli, monkeypatch):
    """An answer with a letter that the terminal lacks would be lost, and all later ones with it."""
    monkeypatch.setattr(Bagel, "run_many", _answering("ein grüner Käfer"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    ran = cli("text2text", "--quiet", "--prompts", "a", "b")
    lines = (ran.folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line).get("text") for line in lines] == ["ein grüner Käfer"] * 2


def _answering(text: str):
    def run_many(self, requests, progress=None):
        from bagel_jax import Result

        for request in requests:
            yield request, Result(request.request_id, request.modality, text=text)

    return run_many
