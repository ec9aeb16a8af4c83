"""What the command line does: results, their record, progress, and that the Python API does the same."""

from __future__ import annotations

import copy
import io
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
from commands import Cli, Ran, golden_options, process, small_copy
from golden import Case, relative_error
from PIL import Image
from small import lying, random_image

import bagel_jax
from bagel_jax import DEFAULTS, MODALITIES, InputError, Request, Settings
from bagel_jax.bagel import Bagel
from bagel_jax.command import from_flags
from bagel_jax.engine.context import steps
from bagel_jax.engine.denoise import steps as loop
from bagel_jax.options import settings_of
from bagel_jax.request import APPLICABLE, ImageFile
from bagel_jax.run import main, parser
from bagel_jax.settings import EngineConfig

SMALL = ("--height", 96, "--width", 160, "--steps", 3)  # the size of the golden cases, compiled once for all
PROMPTS = ("a red bench below a blue clock", "a blue clock", "two zebras")


@pytest.fixture
def cli(tiny_dir, tmp_path, capsys) -> Cli:
    return Cli(tiny_dir, tmp_path, capsys)


@pytest.fixture
def loaded(tiny, monkeypatch) -> None:
    """The command line gets the model that is loaded already."""
    monkeypatch.setattr(Bagel, "open", lambda *_: copy.copy(tiny))


@pytest.fixture
def small(tiny, monkeypatch) -> Bagel:
    """As `loaded`, with input images resized to 64 pixels instead of 512."""
    model = small_copy(tiny)
    monkeypatch.setattr(Bagel, "open", lambda *_: copy.copy(model))
    return model


@pytest.fixture
def image(cases_dir):
    return cases_dir / "img2img_in0.png"


@pytest.fixture
def asked(monkeypatch) -> list[Request]:
    """The requests that a model runs."""
    requests, run = [], Bagel.run_many

    def noted(self, given, bars):
        return run(self, (requests.append(one) or one for one in given), bars)

    monkeypatch.setattr(Bagel, "run_many", noted)
    return requests


@pytest.mark.parametrize("name", ["text2img", "text2img_think", "img2img"])
def test_golden_images(cli, cases_dir, tmp_path, name):
    """The command line would make another image than the official code from the same noise and settings."""
    case = Case.read(cases_dir, name)
    ran = cli(case.modality, *golden_options(case, tmp_path))
    assert ran.code == 0
    assert relative_error(ran.latents(), case.arrays["final_latent"]) < 1e-4
    assert np.abs(ran.image().astype(int) - case.image).max() <= 1
    assert ran.out == "".join(text + "\n" for text in case.texts)
    assert [record["text"] for record in ran.records] == (case.texts or [None])


@pytest.mark.parametrize("name", ["img2text", "text2text"])
def test_golden_texts(cli, cases_dir, tmp_path, name):
    """A script that reads the answer from stdout would get another one, or something else beside it."""
    case = Case.read(cases_dir, name)
    ran = cli(case.modality, *golden_options(case, tmp_path))
    assert ran.code == 0
    assert ran.out == case.texts[0] + "\n"
    assert [record["text"] for record in ran.records] == case.texts


@pytest.mark.usefixtures("loaded")
def test_several_prompts_one_image_out(cli):
    """REGRESSION 34, 30, 32: prompts would be lost, or an image would depend on what else is asked for."""
    ran = cli("text2img", *SMALL, "--seed", 7, "--save-latents", "--prompts", *PROMPTS)
    assert ran.code == 0
    assert sorted(path.name for path in ran.folder.glob("*.png")) == ["output_0.png", "output_1.png", "output_2.png"]
    kept = [(r["id"], r["prompt"], r["seed"], r["image"]) for r in ran.records]
    assert kept == [(f"output_{i}", p, 7 + i, f"output_{i}.png") for i, p in enumerate(PROMPTS)]
    assert not np.array_equal(ran.image(0), ran.image(1))
    for i in (2, 1):
        alone = cli("text2img", *SMALL, "--seed", 7 + i, "--save-latents", "--prompts", PROMPTS[i])
        np.testing.assert_allclose(alone.latents(), ran.latents(i), rtol=1e-4, atol=1e-4)
        assert np.abs(alone.image().astype(int) - ran.image(i)).max() <= 1


@pytest.mark.usefixtures("loaded")
def test_prompt_and_seed_matter(cli):
    """Every prompt, or every seed, would give the same image."""
    prompt = cli("text2img", *SMALL, "--seed", 3, "--save-latents", "--prompts", PROMPTS[0], PROMPTS[0])
    other = cli("text2img", *SMALL, "--seed", 3, "--save-latents", "--prompts", PROMPTS[1])
    assert not np.array_equal(prompt.latents(0), prompt.latents(1))
    assert not np.array_equal(prompt.latents(0), other.latents(0))


@pytest.mark.usefixtures("loaded")
def test_prompts_from_file(cli, tmp_path, asked):
    """Blank lines would become requests, or a prompt in another language would arrive garbled."""
    prompts = ["ein grüner Käfer", "一只红色的猫", "a red bench"]
    (tmp_path / "prompts.txt").write_text("\n  \n" + "\n\n".join(prompts) + "\r\n\n", encoding="utf-8")
    ran = cli("text2text", "--max-tokens", 2, "--seed", 5, "--txt-prompts", tmp_path / "prompts.txt")
    assert ran.code == 0
    assert [(r["prompt"], r["seed"]) for r in ran.records] == list(zip(prompts, (5, 6, 7), strict=True))
    assert [request.prompt for request in asked] == prompts
    assert prompts[1] in (ran.folder / "results.jsonl").read_text(encoding="utf-8")  # not as \u escapes


@pytest.mark.usefixtures("loaded")
def test_prompts_from_file_of_notepad(cli, tmp_path, asked):
    """A text file saved on Windows would put an invisible character before the first prompt."""
    (tmp_path / "prompts.txt").write_text("a red bench\na blue clock\n", encoding="utf-8-sig")
    assert cli("text2text", "--max-tokens", 2, "--txt-prompts", tmp_path / "prompts.txt").code == 0
    assert [request.prompt for request in asked] == ["a red bench", "a blue clock"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("count", [1, 3])
def test_images_go_to_their_prompts(cli, tmp_path, asked, count):
    """A prompt would be answered about another image than the one given with it."""
    colours = ["red", "green", "blue"][:count]
    for colour in colours:
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{colour}.png")
    paths = [tmp_path / f"{colour}.png" for colour in colours]
    ran = cli("img2text", "--max-tokens", 2, "--prompts", *PROMPTS, "--image-path", *paths)
    assert ran.code == 0
    assert [record["prompt"] for record in ran.records] == list(PROMPTS)
    for i, request in enumerate(asked):
        image, prompt = request.inputs
        assert prompt == PROMPTS[i]
        assert np.array_equal(np.asarray(image.open()), np.asarray(Image.open(paths[i % count])))


@pytest.mark.usefixtures("small")
def test_requests_are_prepared_once(cli, image, monkeypatch):
    """Images of hundreds of requests would all be decoded before the first is answered, or each be resized twice."""
    decoded, prepared, done = [], [], []
    opened, prepare, run = ImageFile.open, Bagel.prepare, Bagel.run_many

    def noted(self, given, bars):
        for answered in run(self, given, bars):
            done.append(len(prepared))
            yield answered

    monkeypatch.setattr(ImageFile, "open", lambda self: (decoded.append(self), opened(self))[1])
    monkeypatch.setattr(Bagel, "prepare", lambda self, request: (prepared.append(request), prepare(self, request))[1])
    monkeypatch.setattr(Bagel, "run_many", noted)
    options = "--ar-max-num-seqs", 1, "--dit-max-num-seqs", 1, "--max-tokens", 2, "--image-path", image
    assert cli("img2text", *options, "--prompts", *"abcdefghijklmnopqrst").code == 0
    assert len(decoded) == len(prepared) == 20
    assert done[0] < 20  # some are prepared when others are done


@pytest.mark.usefixtures("small")
def test_an_edit_of_a_phones_photo_is_upright(cli, tmp_path):
    """The edit of a photo that was taken upright lies on its side."""
    photos = lying(tmp_path, random_image(width=32, height=64))
    edit = "--prompts", *PROMPTS[:1] * 8, "--image-path", *photos, "--steps", 2
    ran = cli("img2img", *edit)
    assert ran.code == 0
    assert {ran.image(i).shape for i in range(8)} == {(64, 32, 3)}


@pytest.mark.parametrize(
    ("modality", "options", "phases"),
    [
        ("text2img", SMALL, {"prefill", "wait", "denoise", "pixels"}),
        ("text2img", (*SMALL, "--max-think-tokens", 12, "--think"), {"prefill", "decode", "wait", "denoise", "pixels"}),
        ("text2text", ("--max-tokens", 4), {"prefill", "decode"}),
    ],
)
def test_record(cli, modality, options, phases):
    """REGRESSION 38: a benchmark read off results.jsonl would hold zeros, phases that never were, or no settings."""
    started = time.perf_counter()
    ran = cli(modality, *options, "--prompts", PROMPTS[0], "--seed", 11)
    wall = time.perf_counter() - started
    [record] = ran.records
    seconds = record["seconds"]
    assert set(seconds) == phases | {"load", "compile"}
    assert all(seconds[name] > 0 for name in phases | {"load"})
    assert seconds["compile"] >= 0
    assert sum(seconds.values()) < wall
    makes_image = modality == "text2img"
    assert (record["id"], record["modality"], record["prompt"]) == ("output_0", modality, PROMPTS[0])
    assert record["seed"] == 11
    assert record["think"] is ("--think" in options)
    assert (record["text"] is None) is ("decode" not in phases)
    assert record["image"] == ("output_0.png" if makes_image else None)
    assert record["size"] == ({"height": 96, "width": 160} if makes_image else None)
    assert "error" not in record
    given = {name[2:].replace("-", "_"): value for name, value in zip(options[::2], options[1::2], strict=False)}
    expected = {name: getattr(DEFAULTS[modality], name) for name in record["settings"]} | {
        name: value for name, value in given.items() if name in record["settings"]
    }
    assert record["settings"] == {k: list(v) if isinstance(v, tuple) else v for k, v in expected.items()}
    assert {"steps", "height", "cfg_interval"} <= set(record["settings"]) or not makes_image
    assert not list(ran.folder.glob("*.npy"))  # nobody asked for latents


def test_help_shows_the_table_of_defaults(capsys):
    """REGRESSION 15: --help would promise other defaults than requests get."""
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    table = capsys.readouterr().out.split("Defaults by modality:")[1].strip().splitlines()
    assert table[0].split() == list(MODALITIES)
    shown = {}
    for line in table[1:]:
        option, *cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        shown[option[2:].replace("-", "_")] = dict(zip(MODALITIES, cells, strict=True))
    expected = {name: dict.fromkeys(MODALITIES, "-") for name in Settings.__struct_fields__}
    for modality, names in APPLICABLE.items():
        for name in names:
            value = getattr(DEFAULTS[modality], name)
            text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            expected[name][modality] = {"None": "1024", "False": "false", "True": "true"}.get(text, text)
    assert shown == expected


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_entry_has_the_same_defaults(cli, tiny, image, monkeypatch, modality):
    """REGRESSION 15: the command line and the Python API would give different images for the same request."""
    asked = []

    def prepare(_, request):
        asked.append(request)
        raise InputError("far enough")

    monkeypatch.setattr(Bagel, "prepare", prepare)
    image = [image] if modality.startswith("img") else []
    assert cli(modality, "--prompts", "a red bench", *(["--image-path", *image] if image else [])).code == 2
    with pytest.raises(InputError, match="far enough"):
        tiny.generate(modality, "a red bench", *image)
    assert [request.settings for request in asked] == [DEFAULTS[modality]] * 2
    assert [(r.seed, r.think, r.negative_prompt, r.init_noise) for r in asked] == [(0, False, None, None)] * 2


@pytest.mark.usefixtures("small")
def test_edit_says_which_size_it_uses(cli, image):
    """REGRESSION 27: the size asked for an edit would be ignored without a word."""
    ran = cli("img2img", "--steps", 2, "--height", 96, "--prompts", "a blue dress", "--image-path", image)
    assert ran.code == 0
    [record], (height, width) = ran.records, ran.image().shape[:2]
    assert (height, width) == (48, 64)
    assert record["size"] == {"height": height, "width": width}
    [note] = record["notes"]
    assert "height" in note
    assert "input image" in note
    assert "64x48 (width x height)" in note
    assert f"note: request 0: {note}\n" in ran.err


@pytest.mark.usefixtures("loaded")
def test_options_without_effect_are_noted(cli):
    """REGRESSION 36: an option that does nothing here would be swallowed silently."""
    ran = cli("text2text", "--max-tokens", 2, "--steps", 9, "--negative-prompt", "x", "--prompts", "why")
    assert ran.code == 0
    assert ran.records[0]["notes"] == [
        "steps has no effect on text2text",
        "negative_prompt has no effect on text2text",
    ]
    assert "note: request 0: steps has no effect on text2text\n" in ran.err


def standard_error(monkeypatch) -> Callable[[str], str]:
    """What stands on standard error once that holds a text, for which other threads may wait; ten seconds at most.

    To be called in the test itself: pytest puts its own in place after fixtures.
    """
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)

    def wait(text: str) -> str:
        until = time.monotonic() + 10
        while text not in written.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
        return written.getvalue()

    return wait


@pytest.mark.usefixtures("loaded")
def test_denoising_bar_stands_before_the_first_step(cli, monkeypatch):
    """A person would stare at an empty terminal for the minutes of the first step."""
    denoise, seen, shown = loop.denoise, [], standard_error(monkeypatch)
    monkeypatch.setattr(loop, "denoise", lambda *args: (seen.append(shown("0/2")), denoise(*args))[1])
    cli("text2img", *SMALL, "--prompts", "a red bench")
    assert "denoising:   0%" in seen[0]
    assert "0/2" in seen[0]
    assert "2/2" not in seen[0]
    assert "2/2" in shown("2/2")


@pytest.mark.usefixtures("loaded")
def test_decoding_bar_stands_before_the_first_token(cli, monkeypatch):
    """The same for an answer in words."""
    decode, seen, shown = steps.decode, [], standard_error(monkeypatch)
    monkeypatch.setattr(steps, "decode", lambda *args: (seen.append(shown("0/12")), decode(*args))[1])
    cli("text2text", "--max-tokens", 12, "--prompts", "why")
    assert "decoding:   0%" in seen[0]
    assert "0/12" in seen[0]


@pytest.mark.usefixtures("small")
def test_quiet(cli, image):
    """A log file would fill with bars and notes although --quiet was given."""
    options = "--steps", 2, "--height", 64, "--prompts", "a blue dress", "--image-path", image
    ran = cli("img2img", "--quiet", *options)
    assert (ran.code, ran.err, ran.out) == (0, "", "")
    assert ran.records[0]["notes"]


@pytest.mark.parametrize("steps", [2, 5])
def test_steps_are_evaluations_plus_one(tiny, monkeypatch, steps):
    """REGRESSION 10, 11: an image would get one evaluation too many, or one of a single evaluation would be NaN."""
    calls, counted, denoise = [], [], loop.denoise

    def watched(*args):
        counted.append(int(args[-1]))
        return denoise(*args)

    monkeypatch.setattr(loop, "denoise", watched)
    size = {"height": 96, "width": 160}
    result = tiny.generate("text2img", "a red bench", steps=steps, **size, progress=lambda *call: calls.append(call))
    assert calls == [("denoise", int(done), steps - 1) for done in np.cumsum([0, *counted])]
    assert sum(counted) == steps - 1
    assert np.isfinite(result.latents).all()
    for _ in range(6):  # the first ones tell the engine how long evaluations take
        counted.clear()
        unwatched = tiny.generate("text2img", "a red bench", steps=steps, **size)
        if len(counted) <= 3:
            break
    # One evaluation, one right behind it, and all others in one call, since they take no quarter of a second.
    assert counted == [1, 1, steps - 3] or counted == [1] * (steps - 1)
    assert len(counted) <= 3
    assert np.array_equal(result.latents, unwatched.latents)  # to be watched changes nothing


@pytest.mark.usefixtures("loaded")
def test_one_evaluation_from_the_command_line(cli):
    """REGRESSION 11: --steps 2 would divide by zero."""
    ran = cli("text2img", *SMALL[:-1], 2, "--save-latents", "--prompts", "a red bench")
    assert ran.code == 0
    assert np.isfinite(ran.latents()).all()
    assert "1/1" in ran.err


@pytest.mark.usefixtures("loaded")
def test_sampling_comes_from_the_seed(cli):
    """--do-sample would do nothing, or an answer could not be had a second time."""
    options = "--max-tokens", 16, "--do-sample", "--text-temperature", 1, "--prompts", "why"
    first, again, other = (cli("text2text", *options, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.usefixtures("loaded")
def test_negative_prompt_matters(cli):
    """--negative-prompt would be dropped on the way."""
    plain, negative = (
        cli("text2img", *SMALL, "--save-latents", "--prompts", "a red bench", *more)
        for more in ((), ("--negative-prompt", "blurry"))
    )
    assert not np.array_equal(plain.latents(), negative.latents())
    assert negative.records[0]["negative_prompt"] == "blurry"


def test_python_api_gives_the_same(cli, tiny_dir):
    """The three lines of the README would make another image than the command line."""
    ran = cli("text2img", *SMALL, "--seed", 4, "--save-latents", "--prompts", "a red bench")
    model = Bagel.load(tiny_dir, dtype="float32")
    result = model.generate("text2img", "a red bench", height=96, width=160, steps=3, seed=4)
    assert np.array_equal(result.latents, ran.latents())
    assert np.array_equal(np.asarray(result.image), ran.image())


@pytest.mark.parametrize(
    "code",
    [
        "import bagel_jax",
        "from bagel_jax.run import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from bagel_jax.run import main\ntry: main(['--version'])\nexcept SystemExit: pass",
        "from bagel_jax.run import main\nmain('--model x --modality text2img --prompts x --steps 1'.split())",
    ],
)
def test_no_jax_before_it_is_needed(code):
    """--help, or the word about a wrong option, would come seconds late."""
    done = process("-c", code + "\nimport sys; assert 'bagel_jax' in sys.modules\nprint(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not {"jax", "flax", "transformers", "grain", "orbax", "optax"} & set(done.stdout.split())


def test_version(capsys):
    """A report of a fault would not say of which version."""
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"bagel_jax {bagel_jax.__version__}\n"


def test_flags_are_those_of_the_structs():
    """A setting would have no flag, or a flag another default than the setting."""
    args = parser().parse_args([])
    assert all(getattr(args, name) is None for name in Settings.__struct_fields__)
    assert from_flags(args, EngineConfig) == EngineConfig()
    given = ["--no-prefix-cache", "--vae-tiling", "--max-num-seqs", "4", "--num-pages", "9", "--page-size", "16"]
    args = parser().parse_args([*given, "--precompile", "all", "--cfg-interval", "0", "1", "--do-sample"])
    changes = {"prefix_cache": False, "vae_tiling": True, "ar_max_num_seqs": 4, "num_pages": 9, "page_size": 16}
    assert from_flags(args, EngineConfig) == EngineConfig(**changes, precompile="all")
    assert settings_of(args) == {"cfg_interval": [0.0, 1.0], "do_sample": True}


@pytest.fixture(scope="module")
def two_processes(tiny_dir, cases_dir, tmp_path_factory):
    """The same golden request in two processes after each other, as a user would start them, with no cache at first."""
    folder = tmp_path_factory.mktemp("processes")
    case = Case.read(cases_dir, "text2text")
    names = ("COMPILATION_CACHE_DIR", "PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "DISABLE_MOST_OPTIMIZATIONS")
    env = {"XDG_CACHE_HOME": str(folder / "cache"), "XLA_FLAGS": None} | {f"JAX_{name}": None for name in names}
    ran = []
    for i in range(2):
        options = "--model", tiny_dir, "--modality", "text2text", "--dtype", "float32", "--quiet"
        options += "--output", folder / f"run{i}", *golden_options(case, folder)
        done = process("-m", "bagel_jax.run", *options, **env)
        ran.append(Ran(done.returncode, done.stdout, done.stderr, folder / f"run{i}"))
    return case, folder / "cache" / "bagel_jax" / "xla", ran


def test_process(two_processes):
    """A shell script would see a wrong exit code, or find more in the output than the answer."""
    case, _, ran = two_processes
    for one in ran:
        assert (one.code, one.out, one.err) == (0, case.texts[0] + "\n", "")


def test_compiled_programs_are_kept(two_processes):
    """Every start of the command line would compile for minutes again."""
    _, cache, (first, second) = two_processes
    assert [path for path in cache.iterdir() if path.stat().st_size]
    assert 0 < second.records[0]["seconds"]["compile"] < 0.6 * first.records[0]["seconds"]["compile"]
