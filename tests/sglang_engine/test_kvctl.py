"""kvctl and the start scripts with a real SGLang server, by the same tests as for vLLM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from devkit.servers import Fleet
from devkit.sglang_servers import ENVIRONMENT
from kvcached_core.ledger import Runtime
from tests.engine.test_kvctl import Scripts, port, script
from tests.sglang_engine.conftest import MODEL_FLAGS, PAGED

__all__ = ["port"]
pytestmark = pytest.mark.engine

# Options that the rig needs on a CPU; with a GPU there are none.
_FLAGS = [
    "--attention-backend",
    "torch_native",
    "--dtype",
    "float32",
    "--skip-server-warmup",
    "--sleep-on-idle",
]


@pytest.fixture(scope="module")
def engine() -> str:
    """Return the name of the engine that the scripts start."""
    return "sglang"


@pytest.fixture(scope="module")
def served(
    engine: str, fleet: Fleet, port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runtime]:
    """Run start_server.sh; yield the runtime directory."""
    folder = tmp_path_factory.mktemp("start") / "run"
    with script(engine, fleet, folder, port, [*MODEL_FLAGS, *PAGED, *_FLAGS], **ENVIRONMENT) as runtime:
        yield runtime


class TestSglang(Scripts):
    """With SGLang."""
