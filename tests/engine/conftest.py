"""An engine of each topology, and what requests give with nobody beside them."""

from __future__ import annotations

import pytest
from mixed_load import empty, mixed
from small import model, new_model

from bagel_jax.settings import TOPOLOGIES


@pytest.fixture(params=TOPOLOGIES)
def bagel(request, caplog):
    """A model whose engine has served nobody yet, and is left empty; it must not have had to begin anew."""
    made = new_model(topology=request.param)
    yield made
    made.close()
    empty(made)
    faults = [one for one in caplog.get_records("call") if one.name.startswith("bagel_jax.engine")]
    assert not faults


@pytest.fixture(scope="session")
def alone():
    """What each of some requests gives with nobody beside it."""
    return {request.request_id: model().run(request) for request in mixed(12)}
