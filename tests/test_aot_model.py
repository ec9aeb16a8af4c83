"""The published model compiled for slices that are not here: what is asked, what is counted, two real compiles."""

from __future__ import annotations

import importlib.util
import json
import subprocess

import jax
import jax.numpy as jnp
import pytest
from checkpoints import DATA, official_shapes
from commands import process
from small import CONFIG

from bagel_jax.aot import model
from bagel_jax.aot.__main__ import main
from bagel_jax.aot.cost import Exchange, exchanges, link_bytes, matmul_flops
from bagel_jax.aot.programs import Model
from bagel_jax.aot.published import PUBLISHED
from bagel_jax.checkpoint.sizes import read_config
from bagel_jax.devices import MeshShape
from bagel_jax.placement.placement import Placement

HLO = """
HloModule jit_step

%body.1 (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %all-reduce.1 = bf16[4,8]{1,0:T(8,128)} all-reduce(%dot.1), channel_id=1, to_apply=%add.1
  %ag = (bf16[2,8]{1,0}, bf16[4,8]{1,0}) all-gather-start(%p.1), dimensions={0}
  ROOT %tuple.1 = (s32[], bf16[4,8]{1,0}) tuple(%i, %all-reduce.1)
}

%condition.1 (p: (s32[], bf16[4,8])) -> pred[] {
  %limit.1 = s32[]{:T(128)} constant(28)
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %limit.1), direction=LT
}

ENTRY %main.1 (a: bf16[4,8]) -> bf16[4,8] {
  %while.1 = (s32[], bf16[4,8]) while(%tuple.0), condition=%condition.1, body=%body.1
  ROOT %all-to-all.1 = f32[2]{0} all-to-all(%x), dimensions={0}
}
"""


class Shapes:
    directory, shapes = DATA / "official", staticmethod(official_shapes)


def test_published_sizes():
    """All that is said of the published model would be of another one."""
    assert read_config(Shapes()) == PUBLISHED


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--target", "v9-8"], "--target is 'v9-8'; it must be one of v5e-4"),
        (["--target", "v5e-8", "--mesh", "tensor=x"], "--mesh is 'tensor=x'"),
        (["--target", "v5e-8", "--dtype", "int8"], "--dtype is 'int8'"),
        (["--target", "v5e-8", "--size", "5000"], "--size is 5000"),
        (["--target", "v5e-8", "--size", "1000"], "--size is 1000; it must be a multiple of 16"),
    ],
)
def test_bad_input(flags, said, capsys):
    """A typing error would end in a traceback, or after an hour of compiling for something else."""
    assert main(["model", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1


def test_mesh_of_another_size(monkeypatch, capsys):
    """A mesh of four devices would be reported as that of eight."""
    monkeypatch.setattr(model, "devices", lambda *_: [])
    assert main(["model", "--target", "v5e-8", "--mesh", "tensor=4"]) == 2
    assert "of 4 devices, but v5e-8 has 8" in capsys.readouterr().err


def test_collectives_in_loops():
    """What goes over links in 28 layers would be told of one."""
    found = exchanges(HLO)
    assert found == [
        Exchange("all-reduce", 28, 28 * 64),
        Exchange("all-gather", 28, 28 * 64),
        Exchange("all-to-all", 1, 8),
    ]
    assert link_bytes(found[:1], 4) == 28 * 64 * 1.5


def test_operations_in_loops():
    """A step of 28 layers would be estimated as one layer."""

    def layers(x, kernels):
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]

    jaxpr = jax.make_jaxpr(jax.jit(layers))(jnp.zeros((2, 8)), jnp.zeros((5, 8, 8))).jaxpr
    assert matmul_flops(jaxpr, loops=True) == 5 * 2 * 2 * 8 * 8
    assert matmul_flops(jaxpr, loops=False) == 2 * 2 * 8 * 8


def test_an_abort_is_a_line(monkeypatch, capsys):
    """A compiler that ends its process would hide all programs behind it, or pass unnoticed."""
    monkeypatch.setattr(model, "devices", lambda *_: [])
    fine = {"seconds": 1, "arguments": 2**30, "temporary": 0, "flops": 1e12, "kv": 0}
    fine |= {"exchanges": [["all-reduce", 56, 2**20]]}

    def run(command, **_):
        said = {"names": ["good", "bad"], "weights": 2**32, "pages": 2**30, "num_pages": 9}
        if command[-1] == "bad":
            return subprocess.CompletedProcess(command, -6, "", "F0101 fusion_util.cc:1] Check failed: no\n")
        return subprocess.CompletedProcess(command, 0, json.dumps(said | fine) + "\n", "")

    monkeypatch.setattr(model.subprocess, "run", run)
    assert main(["model", "--target", "v5e-8", "--mesh", "tensor=8"]) == 1
    good, bad, last = capsys.readouterr().out.splitlines()[-3:]
    assert good == "| good | 0.00 | 10.75 | 56 all-reduce 1 MiB | 1 | 5.1 |"
    assert bad.startswith("| bad | FAILED: the compiler ended its process (signal 6) F0101 fusion_util.cc")
    assert last.startswith("1 of 2 programs are good")


def test_all_programs_trace():
    """A program's arguments changed and the command knows the old ones."""
    placement = Placement.over(jax.devices("cpu")[:1], 1)
    made = Model(placement, jnp.float32, CONFIG.max_image_size, CONFIG)
    programs = list(made.programs())
    assert len({program.name for program in programs}) == len(programs)
    for program in programs:
        if "512" not in program.name:  # which so small a model has not
            assert matmul_flops(program.trace().jaxpr.jaxpr, loops=True) > 0, program.name


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
    ("target", "mesh", "program"),
    [
        ("v5e-8", "tensor=8", "denoise 1024², 2 rows"),
        ("v6e-4", "tensor=4", "decode, 8 rows"),
        ("v6e-4", "tensor=4", "VAE decoder, 1024²"),
    ],
)
def test_full_size_compiles(target, mesh, program):
    """The model would be found not to compile, or not to fit, on the first slice; the decoder not to end."""
    flags = "--target", target, "--mesh", mesh, "--only", program
    done = process(
        "-m", "bagel_jax.aot", "model", *flags, timeout=900, JAX_DISABLE_MOST_OPTIMIZATIONS="0", XLA_FLAGS=None
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert MeshShape.parse("mesh", mesh).size > 1
    assert "all-reduce" in done.stdout
