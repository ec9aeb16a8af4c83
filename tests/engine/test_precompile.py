"""Programs compiled ahead of the first request."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from small import new_model, random_image

from bagel_jax.request import Request

SIDES = (4, 8, 12, 16, 20, 24, 28, 32)


def requests(count: int, seed: int):
    """Images made, edited and asked about, each of another size."""
    random = np.random.RandomState(seed)
    made = []
    for i in range(count):
        height, width = (int(x) for x in random.choice(SIDES, 2))
        kind, options = ("text2img", "img2img", "img2text")[i % 3], {"request_id": f"{seed} {i}"}
        if kind == "text2img":
            options |= {"height": height, "width": width, "steps": 2 + i % 3}
        else:
            options |= {"image": random_image(i, *random.randint(20, 200, 2))}
            options |= {"steps": 2 + i % 3} if kind == "img2img" else {"max_tokens": 3}
        made.append(Request.create(kind, f"a bench number {i}", **options))
    return made


@pytest.mark.parametrize("topology", ["two-stage", pytest.param("single-stage", marks=pytest.mark.slow)])
def test_regression_57_fifty_sizes_compile_nothing(topology):
    """A server stops for a minute whenever somebody's photo has a size that nobody's had before."""
    made = new_model(topology=topology, precompile="all", ar_max_num_seqs=2, max_num_batched_tokens=128, num_pages=100)
    told = []
    made.start(lambda *report: told.append(report))
    assert [phase for phase, _, _ in told][-1] == "compile"
    assert told[-1][1] == told[-1][2] > 20
    compiled = []

    def note(event: str, _: float, **__) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for request in requests(25, 0):
            assert made.run(request) is not None
        results = [result for _, result in made.run_many(requests(25, 1))]
        assert not [result for result in results if isinstance(result, Exception)]
        assert compiled == []
        jax.jit(lambda x: 5 * x + 1)(np.ones(11))
        assert compiled  # or else nothing is counted here
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    made.close()
