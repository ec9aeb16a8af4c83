"""Several processes that run one command, as on the hosts of a TPU slice."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import process
from golden import relative_error
from PIL import Image

from bagel_jax.errors import InputError
from bagel_jax.hosts import check

TWO = {
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
    "JAX_PLATFORMS": "cpu",
}
DRAW = ["-m", "bagel_jax.run", "--modality", "text2img", "--steps", "5", "--save-latents"]


@contextlib.contextmanager
def team(folder, *options, count: int = 2, command=DRAW):
    """Processes that run the command line together, each with two devices and an output folder of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [
                *(sys.executable, *command, "--output", str(folder / str(number)), *options),
                *("--coordinator", f"localhost:{port}", "--num-processes", str(count), "--process-id", str(number)),
            ],
            env=os.environ | TWO,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        yield started
    finally:
        for one in started:
            one.kill()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("localhost", 2, 0), "--coordinator is 'localhost'; it must be HOST:PORT"),
        (("localhost:99999", 2, 0), "HOST:PORT"),
        (("localhost:99", None, 0), "--num-processes is None"),
        (("localhost:99", 2, 2), "--process-id 2"),
        ((None, 2, 0), "they go with --coordinator HOST:PORT"),
        (("auto", 2, None), "they go with --coordinator HOST:PORT"),
    ],
)
def test_values_that_do_not_go_together(values, said):
    """A process waits five minutes for others that can never come."""
    with pytest.raises(InputError, match=said):
        check(*values)


def test_bad_input_ends_all(tmp_path):
    """Process 0 refuses the request, and the others wait for it."""
    with team(tmp_path, "--height", "9999") as started:
        said = [one.communicate(timeout=120) for one in started]
        assert [one.returncode for one in started] == [2, 0], said
    assert "error: height is 9999; it must be a multiple of 16" in said[0][1]
    assert not (tmp_path / "1").exists()


@pytest.mark.slow
def test_one_command_on_two_hosts(tmp_path):
    """The image of a mesh over two processes is that of one device, and process 0 alone writes it."""
    with team(tmp_path, "--mesh", "data=2,tensor=2") as started:
        said = [one.communicate(timeout=280) for one in started]
        assert [one.returncode for one in started] == [0, 0], said
    assert not any("is gone" in errors for _, errors in said), said
    assert not (tmp_path / "1").exists()
    alone = process(*DRAW, "--output", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    latents = [np.load(tmp_path / name / "output_0.latent.npy") for name in ("0", "alone")]
    assert relative_error(*latents) < 1e-5


@pytest.mark.slow
def test_a_batch_worker_of_two_processes(tmp_path):
    """Each process claims blocks of its own, and waits for the other to take part in them."""
    job = tmp_path / "job.jsonl"
    line = {"modality": "text2img", "prompt": "a red star on a white background", "steps": 4}
    job.write_text("".join(json.dumps(line | {"id": f"star-{i}"}) + "\n" for i in range(3)) + "{}\n")
    command = ["-m", "bagel_jax.batch", job, "--shard-size", "2"]
    for count in (4, 0):  # the second time there is nothing to do
        with team(tmp_path, "--mesh", "data=2,tensor=2", command=command) as started:
            said = [one.communicate(timeout=280) for one in started]
            assert [one.returncode for one in started] == [0, 0], said
        assert f"this worker answered {count} requests" in said[0][0]
    assert not (tmp_path / "1").exists()
    alone = process(*command, "--output", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    for name in ("part-00000/star-0.png", "part-00000/star-1.png", "part-00001/star-2.png"):
        images = [np.asarray(Image.open(tmp_path / folder / name), np.int16) for folder in ("0", "alone")]
        assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_dies(tmp_path, dead):
    """The others hang for ever in a program that waits for its part."""
    with team(tmp_path, "--mesh", "data=2,tensor=2", "--steps", "1000") as started:
        time.sleep(20)  # wherever they are by then
        started[dead].kill()
        said = started[1 - dead].communicate(timeout=120)
        assert started[1 - dead].returncode != 0, said
        assert said[1].splitlines()[-1].startswith("error: a process of this run is gone, "), said
