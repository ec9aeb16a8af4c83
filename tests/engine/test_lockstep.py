"""Several hosts in lock-step: real processes, each with a replica of the model, that do what the first one decides."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from mixed_load import mixed
from small import model

TESTS = Path(__file__).parents[1]

# `python -c WORKER PORT NUMBER COUNT FILE`: process 0 answers requests, the others follow; each writes what it saw.
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
from bagel_jax.request import Result

made = new_model(topology="single-stage")
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
    requests = mixed(12)
    handles = [driver.submit(made.prepare(request)) for request in requests]
    handles[5].cancel()
    for i, handle in enumerate(handles):
        if i != 5:
            handle.result(timeout=300)
    driver.close()
engine.check()
with open(sys.argv[4], "w") as file:
    json.dump(seen, file)
"""


def test_two_processes_do_the_same(tmp_path):
    """Hosts that decide by their own clocks dispatch different programs, and wait for each other for ever."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "JAX_PLATFORMS": "cpu"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(port), str(number), "2", str(tmp_path / f"{number}.json")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], [errors[-2000:] for _, errors in outputs]
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    assert first == second
    requests = mixed(12)
    assert set(first) == {request.request_id for i, request in enumerate(requests) if i != 5}
    for request in requests[:4]:
        alone = model().run(request)
        text, latents = first[request.request_id]
        assert text == alone.text
        if latents is not None:
            np.testing.assert_allclose(np.asarray(latents, np.float32), alone.latents, rtol=1e-4, atol=1e-4)
