"""Options that are refused, features that are warned about, and the sources of settings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from kvcached_core.errors import ConfigError, UnsupportedError
from kvcached_core.units import Size
from vllm_kvcached import RUN_VARIABLE, SCHEDULER, WORKER
from vllm_kvcached.support import adopt_logging, instance, refuse_unsupported, settings


def vllm_config(changes: Mapping[str, Any] | None = None) -> Any:
    """Return a supported configuration with these attributes (`part.name`) changed."""
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            worker_cls=WORKER, distributed_executor_backend="mp", enable_elastic_ep=False, enable_dbo=False,
            nnodes=1, data_parallel_size=1, decode_context_parallel_size=1,
        ),
        cache_config=SimpleNamespace(num_gpu_blocks_override=None),
        scheduler_config=SimpleNamespace(scheduler_cls=SCHEDULER),
        model_config=SimpleNamespace(
            enable_sleep_mode=False, sleep_mode_backend="cumem", is_encoder_decoder=False
        ),
        kv_transfer_config=None, ec_transfer_config=None, speculative_config=None, lora_config=None,
        additional_config={}, instance_id="abc",
    )  # fmt: skip
    for path, value in (changes or {}).items():
        part, _, name = path.rpartition(".")
        setattr(getattr(config, part) if part else config, name, value)
    return config


REFUSED: list[tuple[str, Any, str]] = [
    ("parallel_config.worker_cls", "mine.Worker", "class mine.Worker cannot hold an elastic cache"),
    ("scheduler_config.scheduler_cls", "mine.Own", "class mine.Own does not plan elastic memory"),
    ("scheduler_config.scheduler_cls", None, "scheduler class None does not plan"),
    ("kv_transfer_config", object(), "leave out --kv-transfer-config"),
    ("ec_transfer_config", object(), "leave out --ec-transfer-config"),
    ("parallel_config.distributed_executor_backend", "ray", "executor 'ray' is not supported"),
    ("parallel_config.distributed_executor_backend", "external_launcher", "executor 'external_launcher'"),
    ("cache_config.num_gpu_blocks_override", 100, "num_gpu_blocks_override contradicts"),
    ("model_config.sleep_mode_backend", "criu", "sleep mode by 'criu' also takes"),
    ("parallel_config.enable_elastic_ep", True, "leave out --enable-elastic-ep"),
    ("parallel_config.enable_dbo", True, "leave out --enable-dbo"),
    ("additional_config", {"kvcached": {"layout": "layer"}}, "set KVCACHED_LAYOUT to auto, block or engine"),
]  # fmt: skip
WARNED: list[tuple[str, Any, str]] = [
    ("speculative_config", object(), "speculative decoding"),
    ("parallel_config.data_parallel_size", 2, "data parallelism"),
    ("lora_config", object(), "LoRA"),
    ("parallel_config.decode_context_parallel_size", 2, "context parallelism"),
    ("model_config.is_encoder_decoder", True, "encoder-decoder models"),
]


@pytest.fixture(autouse=True)
def _loggers_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("kvcached_core", "vllm_kvcached"):
        logger = logging.getLogger(name)
        for attribute in ("handlers", "propagate", "level"):
            monkeypatch.setattr(logger, attribute, getattr(logger, attribute))


@pytest.mark.parametrize("backend", ["mp", "uni", None])
def test_supported_options_pass_without_a_warning(
    backend: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_unsupported(vllm_config({"parallel_config.distributed_executor_backend": backend}))
    assert caplog.records == []


@pytest.mark.parametrize(("path", "value", "sentence"), REFUSED)
def test_each_unsupported_option_is_refused_with_its_reason(path: str, value: Any, sentence: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        refuse_unsupported(vllm_config({path: value}))
    assert str(error.value).startswith("--kv-cache-backend kvcached: ") and sentence in str(error.value)
    assert ";" not in str(error.value), "one reason"


def test_several_nodes_pass_and_data_parallelism_over_them_is_refused() -> None:
    refuse_unsupported(vllm_config({"parallel_config.nnodes": 2}))
    with pytest.raises(
        UnsupportedError, match="parallelism over several nodes is not supported: start an engine"
    ):
        refuse_unsupported(
            vllm_config({"parallel_config.nnodes": 2, "parallel_config.data_parallel_size": 2})
        )


def test_all_reasons_are_in_one_error() -> None:
    different = {path: value for path, value, _ in REFUSED}
    with pytest.raises(UnsupportedError) as error:
        refuse_unsupported(vllm_config(different))
    assert str(error.value).count(";") == len(different) - 1


def test_a_stored_plan_of_another_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_STARTUP_PLAN", "1")
    with pytest.raises(UnsupportedError, match="unset VLLM_ENABLE_STARTUP_PLAN"):
        refuse_unsupported(vllm_config())


@pytest.mark.parametrize(("path", "value", "what"), WARNED)
def test_untested_features_are_warned_about(
    path: str, value: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("vllm"), "handlers", [handler])
    refuse_unsupported(vllm_config({path: value}))
    assert said == [f"kvcached has not been tested with {what}; please report what you see"]


def test_our_log_lines_go_to_vllms_handlers() -> None:
    adopt_logging()
    engine = logging.getLogger("vllm")
    for name in ("kvcached_core", "vllm_kvcached"):
        ours = logging.getLogger(name)
        assert (ours.handlers, ours.propagate, ours.level) == (
            engine.handlers,
            engine.propagate,
            engine.level,
        )


def test_settings_come_from_the_additional_config_and_from_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCACHED_WEIGHT", "9")
    chosen = settings(vllm_config({"additional_config": {"kvcached": {"limit": "2GiB"}, "other": {}}}))
    assert (chosen.limit, chosen.weight) == (Size(2 << 30), 9)
    assert settings(vllm_config({"additional_config": object()})).weight == 9
    with pytest.raises(ConfigError, match=r"kvcached\.weight='x'"):
        settings(vllm_config({"additional_config": {"kvcached": {"weight": "x"}}}))
    with pytest.raises(ConfigError, match="expected an object of settings"):
        settings(vllm_config({"additional_config": {"kvcached": "2GiB"}}))


def test_scheduler_and_workers_of_one_engine_have_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_VARIABLE, "0123")
    assert instance(vllm_config()) == instance(vllm_config()) == "0123-abc"
    assert instance(vllm_config({"instance_id": "other"})) == "0123-other"
