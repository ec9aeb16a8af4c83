"""Several hosts in lock-step: real processes with a mesh over all of them, that do what the first one decides."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from golden import relative_error
from mixed_load import mixed
from small import model

TESTS = Path(__file__).parents[1]

# `python -c WORKER PORT NUMBER COUNT FILE MESH`: process 0 answers requests, the others follow; each tells what it saw.
WORKER = """
import json, sys
import jax, numpy as np
port, number, count = map(int, sys.argv[1:4])
jax.distributed.initialize(f"localhost:{port}", count, number)
from mixed_load import mixed
from small import new_model
from bagel_jax.engine.core import Engine
from bagel_jax.engine.drivers import lockstep
from bagel_jax.engine.ticket import Done
from bagel_jax.errors import InputError
from bagel_jax.request import Request

made = new_model(topology="single-stage", mesh=sys.argv[5])
engine = Engine(made.load_weights(), made.placements, made.config, made.dtype, made.tokenizer, made.settings)
seen = {}

def listen(events):
    for event in events:
        if isinstance(event, Done):
            outcome = event.outcome
            latents = None if getattr(outcome, "latents", None) is None else np.asarray(outcome.latents).tolist()
            seen[event.request_id] = [getattr(outcome, "text", str(outcome)), latents]

if number:
    lockstep.follow(engine, listen)
else:
    step = engine.step
    engine.step = lambda *args: (events := step(*args), listen(events))[0]
    driver = lockstep.LockstepDriver(engine)
    requests = mixed(8)
    handles = [driver.submit(made.prepare(request)) for request in requests]
    hopeless = driver.submit(made.prepare(Request.create("text2text", "a", max_tokens=32000)))
    try:
        hopeless.result(timeout=600)
    except InputError:
        pass
    else:
        raise AssertionError("more tokens than there are pages")
    handles[5].cancel()
    for i, handle in enumerate(handles):
        if i != 5:
            handle.result(timeout=600)
    driver.close()
engine.check()
with open(sys.argv[4], "w") as file:
    json.dump(seen, file)
"""


def told(folder: Path, count: int, mesh: str, devices: int) -> list[dict]:
    """What each of `count` processes saw, with so many devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "JAX_PLATFORMS": "cpu",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(port), str(number), str(count), str(folder / f"{number}.json"), mesh],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        outputs = [worker.communicate(timeout=900) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * count, [errors[-2000:] for _, errors in outputs]
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(count)]


def test_two_processes_do_the_same(tmp_path):
    """Hosts that decide by their own clocks dispatch different programs, and wait for each other for ever."""
    first, second = told(tmp_path, 2, "data=2", 1)
    assert first == second
    assert len(first) >= 8


@pytest.mark.slow
@pytest.mark.parametrize(("count", "mesh"), [(2, "data=2,tensor=2"), (4, "data=2,sequence=2,tensor=2")])
def test_a_mesh_over_processes(tmp_path, count, mesh):
    """A load, a cancel and a hopeless request on a mesh of which each process has two devices."""
    first, *others = told(tmp_path, count, mesh, 2)
    assert all(other == first for other in others)
    expected = {request.request_id: result for request, result in model().run_many(mixed(8))}
    assert len(first) >= 8
    for name, (text, latents) in first.items():
        if name not in expected:  # the hopeless one
            continue
        if latents is None:
            assert text == expected[name].text
        else:
            assert relative_error(latents, expected[name].latents) < 1e-5
