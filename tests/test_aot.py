"""Compiling for chips that are not here: the command line, and one real compile."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.resources import files

import jax
import pytest

from bagel_jax.aot import kernels, targets
from bagel_jax.aot.__main__ import main


def test_bad_target(capsys):
    """A typing error would end in a traceback of libtpu."""
    assert main(["kernels", "--target", "v9"]) == 2
    assert capsys.readouterr().err == "error: --target is 'v9'; it must be one of v5e, v6e, v5p, h100\n"


@pytest.mark.parametrize("target", ["v5e", "h100"])
def test_without_compilers(target, monkeypatch, capsys):
    """Nobody would know what to install."""
    monkeypatch.setattr(targets, "find_spec", lambda module: None)
    assert main(["kernels", "--target", target]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'bagel_jax[aot]'" in error


def test_description_ships():
    """The H100 could be compiled for in the repository only."""
    assert "cuda_compute_capability" in (files("bagel_jax") / "pallas" / "targets" / "h100.txtpb").read_text()


def test_a_kernel_fails(monkeypatch, capsys):
    """A kernel that does not compile would pass unnoticed, or hide what is wrong with the next."""
    monkeypatch.setattr(kernels, "devices", lambda name, target: [None])

    def compile_one(case, target, device):
        if case.name == "paged_attention":
            raise ValueError("no\nroom")
        return 3 * 2**10

    monkeypatch.setattr(kernels, "_compile", compile_one)
    assert main(["kernels", "--target", "v5e"]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.endswith("FAILED: ValueError: no room")]
    assert (len(lines), len(failed)) == (6, 2)
    assert lines[-1].endswith("VMEM 3 KiB")


def test_xla_is_no_kernel():
    """Shapes that a kernel stopped taking would be reported as compiled: XLA takes everything."""
    case = kernels._cases("xla")[0]
    cpu = targets.TARGETS["v5e"]._replace(platform="cpu")
    with pytest.raises(RuntimeError, match="0 kernels are in the program instead of 1"):
        kernels._compile(case, cpu, jax.devices("cpu")[0])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_compiles_for_a_tpu(tmp_path):
    """The TPU kernel would be found not to compile on the first TPU."""
    done = subprocess.run(
        [sys.executable, "-m", "bagel_jax.aot", "kernels", "--target", "v5e"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert all("VMEM" in line and "v5e" in line for line in lines)
