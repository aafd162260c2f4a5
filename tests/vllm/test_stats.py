"""Metrics of the KV memory in vLLM's own /metrics."""

from __future__ import annotations

import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm.v1.metrics.loggers import StatLoggerBase

from kvcached_core.ledger import Runtime
from kvcached_core.ledger.tools.metric_definitions import DURATION_METRICS, ENGINE_METRICS
from tests.ledger.helpers import GRANULE, attach, die, hold
from tests.vllm.test_support import vllm_config
from vllm_kvcached.stats import LABELS, PREFIX, InstanceCollector, KVCachedStats
from vllm_kvcached.support import instance

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _registry_as_before() -> Any:
    before = set(REGISTRY._collector_to_names)
    yield
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    monkeypatch.setenv("KVCACHED_RUNTIME_DIR", str(tmp_path / "runtime"))
    return Runtime.open()


def elastic(scheduler_cls: str | None = "ours") -> Any:
    """Return the configuration of an engine that serves the model `m`."""
    config = (
        vllm_config() if scheduler_cls == "ours" else vllm_config({"scheduler_config.scheduler_cls": None})
    )
    config.model_config.served_model_name = "m"
    return config


def samples() -> dict[str, float]:
    """Return the samples of kvcached's metrics by name and rank."""
    return {
        f"{sample.name}/{sample.labels['rank']}": sample.value
        for family in text_string_to_metric_families(generate_latest(REGISTRY).decode())
        for sample in family.samples
        if sample.name.startswith(PREFIX)
    }


def test_an_elastic_engine_has_all_metrics_of_its_own_ranks(runtime: Runtime) -> None:
    config = elastic()
    first, second = (attach(runtime, instance(config), rank) for rank in range(2))
    other = attach(runtime, "another", name="another")
    hold(first, 3)
    logger = KVCachedStats(config)
    assert samples()[f"{PREFIX}held_bytes/0"] == 3 * GRANULE and samples()[f"{PREFIX}held_bytes/1"] == 0
    times = [f"{metric.name}_{part}" for metric in DURATION_METRICS for part in ("bucket", "count", "sum")]
    names = [*times, *(metric.name for metric in ENGINE_METRICS)]
    assert set(samples()) == {f"{PREFIX}{name}/{rank}" for name in names for rank in (0, 1)}
    hold(first, 2)
    logger.record(scheduler_stats=None, iteration_stats=None, engine_idx=0)
    logger.log_engine_initialized()
    assert samples()[f"{PREFIX}held_bytes/0"] == 5 * GRANULE, "each scrape reads the ledger"
    line = next(
        x for x in generate_latest(REGISTRY).decode().splitlines() if x.startswith(f"{PREFIX}weight{{")
    )
    assert all(f'{label}="' in line for label in LABELS) and 'model_name="m"' in line
    die(first)
    assert f"{PREFIX}held_bytes/0" not in samples() and second.slot != other.slot


def test_a_stock_engine_has_no_metrics(runtime: Runtime) -> None:
    attach(runtime, instance(elastic()))
    KVCachedStats(elastic(None))
    assert samples() == {}


def test_an_engine_registers_one_collector_and_survives_a_lost_ledger(runtime: Runtime) -> None:
    config = elastic()
    attach(runtime, instance(config))
    for _ in range(2):
        KVCachedStats(config)
    ours = [each for each in REGISTRY._collector_to_names if isinstance(each, InstanceCollector)]
    assert len(ours) == 1 and samples()
    runtime.path.chmod(0o777)
    runtime.device("host").ledger.write_bytes(b"x" * 9000)
    assert samples() == {}


def test_the_entry_point_is_what_vllm_accepts() -> None:
    table = tomllib.loads((ROOT / "plugins/vllm_kvcached/pyproject.toml").read_text())["project"]
    module, _, name = table["entry-points"]["vllm.stat_logger_plugins"]["kvcached"].partition(":")
    assert issubclass(getattr(import_module(module), name), StatLoggerBase)
