"""scripts/convert_weights.py: its dry run on the full-size model, its exit codes, and what it prints."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import checkpoints
import pytest
from commands import script_runner

from bagel_jax.checkpoint.source import ModelSource

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_weights.py"
GIB = 2**30

# The script in a process of its own, with the peak of that process's memory.
_MEASURED = """
import json, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = end.code
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"code": code, "peak": peak, "torch": "torch" in sys.modules}))
"""


@pytest.fixture
def convert(monkeypatch, capsys):
    """Runs the script in this process; returns exit code, stdout and stderr."""
    return script_runner(SCRIPT, monkeypatch, capsys)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The published checkpoint with holes for weights."""
    directory = checkpoints.write_official(tmp_path_factory.mktemp("official") / "model")
    yield directory
    shutil.rmtree(directory)  # backups and copies of /tmp may not know holes


def tree(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything in a directory."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in (directory, *directory.rglob("*"))}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_dry_run_of_the_full_size(official):
    """Before 29 GB are converted: every tensor in its place, in a minute and 2 GB of memory, without PyTorch."""
    before, started = tree(official.parent), time.perf_counter()
    command = [sys.executable, "-c", _MEASURED, str(SCRIPT), str(official), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    *lines, measured = done.stdout.splitlines()
    measured = json.loads(measured)
    assert measured["code"] == 0
    assert measured["peak"] < 2 * GIB
    assert not measured["torch"]
    assert seconds < 60
    assert tree(official.parent) == before

    sizes = {kind: [math.prod(s) for s in checkpoints.official_shapes(kind).values()] for kind in ("ema", "ae")}
    tensors, parameters = len(sizes["ema"] + sizes["ae"]), sum(sizes["ema"] + sizes["ae"])
    num_bytes = 2 * sum(sizes["ema"]) + 4 * sum(sizes["ae"])
    assert (tensors, round(parameters / 1e9, 2)) == (1223 + 244, 14.69)
    rows = {line[:24].strip(): line[24:].split() for line in lines if line}
    assert rows["total"] == [f"{n:,}" for n in (tensors, parameters, num_bytes)]
    assert rows["autoencoder"] == [f"{n:,}" for n in (244, sum(sizes["ae"]), 4 * sum(sizes["ae"]))]
    text = "\n".join(lines)
    assert re.search(r"^1,?223 tensors in the model, 244 in the autoencoder$", text, re.MULTILINE)
    for problem in ("missing", "unexpected", "wrong shape"):
        assert f"{problem}: none" in lines


def test_dry_run_names_what_does_not_fit(convert, tmp_path):
    """One tensor removed, one renamed, one of another shape: all named, and exit code 1 for a script to see."""
    shapes = checkpoints.official_shapes("ema")
    layer = "language_model.model.layers.{}.mlp_moe_gen.up_proj.weight"
    del shapes[layer.format(3)]
    shapes["other.weight"] = shapes.pop(layer.format(5))
    shapes[layer.format(7)] = (3584, 18944)
    directory = checkpoints.write_official(tmp_path / "model", shapes)
    code, out, _ = convert(directory, "--dry-run")
    shutil.rmtree(directory)
    assert code == 1
    missing, unexpected, wrong = (out.index(f"\n{word}: ") for word in ("missing", "unexpected", "wrong shape"))
    assert out[missing:unexpected].split() == ["missing:", "2", layer.format(3), layer.format(5)]
    assert out[unexpected:wrong].split() == ["unexpected:", "1", "other.weight"]
    assert out[wrong:].startswith("\nwrong shape: 1\n")
    assert f"tensor {layer.format(7)} has shape [3584, 18944]; the model needs [18944, 3584]" in out[wrong:]


@pytest.mark.parametrize("change", ["missing", "unexpected", "wrong shape"])
def test_dry_run_of_one_fault(convert, tiny_dir, tmp_path, change):
    """Each fault alone is enough for exit code 1."""
    directory = checkpoints.copy(tiny_dir, tmp_path / "model")
    file = directory / checkpoints.FILES["ema"]
    tensor = checkpoints.read_tensors(file)["llm2vae.weight"]
    name, value = {
        "missing": ("llm2vae.weight", None),
        "unexpected": ("llm2vae.extra", tensor),
        "wrong shape": ("llm2vae.weight", tensor[:-1]),
    }[change]
    checkpoints.edit_tensors(file, **{name: value})
    code, out, _ = convert(directory, "--dry-run")
    assert code == 1
    assert f"{change}: 1\n" in out
    assert name in out


def test_dry_run_without_a_size(convert, tiny_dir, tmp_path):
    """Where a size cannot be read at all there is no table, but the tensor is still named."""
    directory = checkpoints.copy(tiny_dir, tmp_path / "model")
    checkpoints.edit_tensors(directory / checkpoints.FILES["ema"], **{"vae2llm.weight": None})
    code, _, err = convert(directory, "--dry-run")
    assert code == 1
    assert "tensor vae2llm.weight is missing" in err


def test_dry_run_writes_nothing(convert, tiny_dir, tmp_path):
    """Not even the destination, if one is given."""
    directory = checkpoints.copy(tiny_dir, tmp_path / "model")
    before = tree(tmp_path)
    code, out, _ = convert(directory, tmp_path / "out", "--dry-run")
    assert code == 0
    assert "missing: none" in out
    assert tree(tmp_path) == before


def test_dry_run_says_that_the_tokenizer_is_missing(convert, tiny_dir, tmp_path):
    """Weights alone cannot be run; it is said before they are converted, and only then."""
    directory = checkpoints.copy(tiny_dir, tmp_path / "model")
    assert "tokenizer" not in convert(directory, "--dry-run")[1]
    for name in ("tokenizer.json", "vocab.json"):
        (directory / name).unlink()
    code, out, _ = convert(directory, "--dry-run")
    assert code == 0
    assert "no tokenizer files" in out


def test_conversion(convert, tiny_dir, tmp_path):
    """Exit code 0, the place on stdout, progress on stderr, and a model in the dtype asked for."""
    out = tmp_path / "out"
    code, stdout, stderr = convert(tiny_dir, out, "--dtype", "bfloat16")
    assert code == 0
    assert stdout == f"wrote {out}\n"
    assert "converting: 100%" in stderr
    assert ModelSource.open(out).config == ModelSource.open(tiny_dir).config
    assert set(json.loads((out / "bagel_jax.json").read_text())["dtypes"].values()) == {"bfloat16"}


def test_source_that_is_none(convert, tiny_dir, tmp_path):
    """Exit code 2 and one line that names it, with and without --dry-run."""
    for args in ((tmp_path / "nowhere", "--dry-run"), (tmp_path / "nowhere", tmp_path / "out")):
        code, _, err = convert(*args)
        assert code == 2
        assert err.startswith("error: ")
        assert str(tmp_path / "nowhere") in err
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [[], ["--dtype", "bfloat16"]])
def test_destination_missing(convert, tiny_dir, args):
    """Asked for by name."""
    code, _, err = convert(tiny_dir, *args)
    assert code == 2
    assert "DST" in err


def test_destination_exists(convert, tiny_dir, tmp_path):
    """Exit code 2, and it is left alone."""
    (tmp_path / "out").mkdir()
    code, _, err = convert(tiny_dir, tmp_path / "out")
    assert code == 2
    assert f"error: {tmp_path / 'out'} is there already" in err
    assert list((tmp_path / "out").iterdir()) == []


def test_source_that_does_not_fit(convert, tiny_dir, tmp_path):
    """A real run refuses what a dry run would have shown; nothing is written."""
    directory = checkpoints.copy(tiny_dir, tmp_path / "model")
    checkpoints.edit_tensors(directory / checkpoints.FILES["ae"], **{"decoder.conv_out.bias": None})
    code, _, err = convert(directory, tmp_path / "out")
    assert code == 2
    assert "tensor decoder.conv_out.bias is missing" in err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("args", [["--dtype", "float16"], ["--dryrun"], ["--dry"], ["a", "b"]])
def test_unknown_arguments(convert, tiny_dir, tmp_path, args):
    """REGRESSION 36: nothing is silently dropped, and no option is guessed from its beginning."""
    code, _, err = convert(tiny_dir, tmp_path / "out", *args)
    assert code == 2
    assert args[0] in err or "unrecognized" in err
    assert not (tmp_path / "out").exists()
