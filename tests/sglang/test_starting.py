"""The start of a rank inside SGLang: its name, its claims in the ledger, and its cleanup after a failure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt import runtime_context

from devkit.models import TINY
from kvcached_core.errors import CapacityError, ConfigError, InvariantError, UnsupportedError
from kvcached_core.ledger import OwnerSnapshot, Runtime, snapshot
from kvcached_core.startup import estimates
from kvcached_core.units import GIB, MIB
from sglang_kvcached import process_state, starting, startup_check, weights
from sglang_kvcached.process_state import RUN_VARIABLE

CAPACITY = 200 * MIB
PORTS = SimpleNamespace(instance_id="server", nccl_port=1)


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make this process the only rank of a server, with its own runtime directory."""
    parallel = SimpleNamespace(dp_rank=None, attn_dp_rank=0, attn_tp_rank=0, attn_tp_size=1, tp_size=1)
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: parallel)
    monkeypatch.setattr(runtime_context, "get_device", lambda: SimpleNamespace(gpu_id=0))
    monkeypatch.setenv("KVCACHED_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("KVCACHED_HOST_CAPACITY", str(CAPACITY))
    monkeypatch.setenv("KVCACHED_HEADROOM", "0")
    monkeypatch.setenv(RUN_VARIABLE, "run")
    monkeypatch.setenv("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "true")
    monkeypatch.setattr(starting, "_current", None)
    process_state.use(None)
    yield
    process_state.use(None)
    if starting._current is not None:
        starting._current.close()


def arguments(**changes: Any) -> Any:
    """Return resolved arguments of a server."""
    given = {
        "served_model_name": "served", "model_path": "org/model", "device": "cpu", "tp_size": 1,
        "load_format": "auto", "kv_cache_dtype": "auto", "disaggregation_mode": "null", **changes,
    }  # fmt: skip
    return SimpleNamespace(resolved_dict=lambda: given)


def runner(tmp_path: Path) -> Any:
    """Return a runner of the tiny model, whose files do not exist."""
    text = SimpleNamespace(num_hidden_layers=TINY["num_hidden_layers"])
    model = SimpleNamespace(
        model_path=str(tmp_path), revision=None, quantization=None, dtype=torch.float32, context_len=2048,
        hf_text_config=text, head_dim=32, v_head_dim=32, get_num_kv_heads=lambda ranks: 4 // ranks,
    )  # fmt: skip
    return SimpleNamespace(model_config=model, device="cpu", gpu_id=0)


def owner(tmp_path: Path) -> OwnerSnapshot:
    """Return the one owner in the ledger."""
    (device,) = snapshot(Runtime.open(tmp_path / "run"))
    (found,) = [each for each in device.owners if each.live]
    return found


def test_a_rank_has_its_models_name_in_the_ledger_and_the_floor_of_one_request(tmp_path: Path) -> None:
    with starting.rank(arguments(), PORTS) as start:
        assert starting.current() is start
        start.wait_for_room(runner(tmp_path))
        found = owner(tmp_path)
        assert (found.name, found.engine, found.model) == ("served", "sglang", "org/model")
        assert found.instance == "run-server-0-0"
        per_token = 4 * 2 * 4 * 32 * 4
        assert 2048 * per_token < found.floor_applied < 1.2 * 2048 * per_token
        assert start.virtual_bytes() == start.limit_bytes() == CAPACITY
        assert start.longest_tokens == 2048 and start.on_host


def test_only_ranks_with_a_geometry_count_as_elastic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with starting.rank(arguments(), PORTS) as start:
        start.wait_for_room(runner(tmp_path))
        assert startup_check.elastic_ranks() == 0
        start.account.describe(page_bytes=MIB, granule_bytes=MIB, granule_count=8, blocks_per_granule=1,
                               block_count=8, stride_bytes=MIB)  # fmt: skip
        assert startup_check.elastic_ranks() == 1
        monkeypatch.setenv(RUN_VARIABLE, "another")
        assert startup_check.elastic_ranks() == 0


def test_a_start_that_fails_leaves_the_ledger(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "sglang_kvcached")
    with pytest.raises(CapacityError), starting.rank(arguments(), PORTS) as start:
        start.wait_for_room(runner(tmp_path))
        assert owner(tmp_path).live
        raise CapacityError("no room for the first granule")
    assert not [
        each for device in snapshot(Runtime.open(tmp_path / "run")) for each in device.owners if each.live
    ]
    assert "kvcached: this engine cannot start: no room for the first granule" in caplog.text
    with pytest.raises(InvariantError, match="only a scheduler that started with kvcached can make"):
        starting.current()


def test_a_resolved_argument_that_rules_kvcached_out_is_refused_before_the_ledger_exists(
    tmp_path: Path,
) -> None:
    with pytest.raises(Exception, match="--pp-size"), starting.rank(arguments(pp_size=2), PORTS):
        pytest.fail("the rank has started")
    assert not (tmp_path / "run").exists()


def test_a_driver_for_another_kind_of_device_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCACHED_DRIVER", "cuda")
    refused = pytest.raises(ConfigError, match="runs on cpu, expected host or auto")
    with refused, starting.rank(arguments(), PORTS) as start:
        start.wait_for_room(runner(tmp_path))


def not_elastic(why: str) -> AbstractContextManager[Any]:
    """Expect the error for a scheduler that is not elastic."""
    return pytest.raises(InvariantError, match=f"asked to be elastic and is not: {why}")


def test_a_scheduler_whose_start_skipped_a_step_is_not_elastic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "begin_settling", lambda scheduler, start: None)
    monkeypatch.setattr(startup_check, "why_not_elastic", lambda scheduler: "its KV pool is stock")
    with not_elastic("it loaded its weights without waiting for its turn"), starting.rank(arguments(), PORTS):
        starting.finish(object())
    with (
        not_elastic("SGLang did not ask for the size of its KV cache"),
        starting.rank(arguments(), PORTS) as start,
    ):
        start.wait_for_room(runner(tmp_path))
        starting.finish(object())
    with not_elastic("its KV pool is stock"), starting.rank(arguments(), PORTS) as start:
        start.wait_for_room(runner(tmp_path))
        start.note_virtual_bytes(start.virtual_bytes())
        starting.finish(object())


def test_the_estimate_of_a_model_follows_its_cache_and_its_ranks(tmp_path: Path) -> None:
    model = runner(tmp_path).model_config
    whole = weights.longest_request_bytes(model, 1, 4)
    assert weights.longest_request_bytes(model, 2, 4) == pytest.approx(whole / 2, abs=1)
    assert weights.longest_request_bytes(model, 1, 1) == pytest.approx(whole / 4, abs=1)
    model.kv_lora_rank, model.qk_rope_head_dim = 512, 64
    assert weights.longest_request_bytes(model, 8, 2) == pytest.approx(1.1 * 2048 * 4 * 576 * 2, abs=1)


def test_a_failed_estimate_counts_as_0_and_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sglang_kvcached")
    model = runner(tmp_path).model_config
    (tmp_path / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little"))
    assert weights.private_bytes(model, "auto", 1, on_host=True) == estimates.HOST_BYTES == GIB
    assert "cannot estimate the size of the weights" in caplog.text


def test_weights_are_shared_by_the_ranks_that_load_them(tmp_path: Path) -> None:
    model = runner(tmp_path).model_config
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 1000)
    assert weights.private_bytes(model, "auto", 3, on_host=False) == estimates.DEVICE_BYTES + 334


@pytest.mark.parametrize(
    ("layout", "backend", "amx", "expected"),
    [
        ("auto", "torch_native", False, "block"),
        ("auto", "torch_native", True, "engine"),
        ("auto", "flex_attention", False, "engine"),
        ("layer", "torch_native", False, "layer"),
        ("engine", "torch_native", False, "engine"),
    ],
)
def test_the_layout_follows_the_attention_backend_of_the_server(
    layout: str, backend: str, amx: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCACHED_LAYOUT", layout)
    monkeypatch.setattr(runtime_context, "attention_backends", lambda: (backend, backend))
    monkeypatch.setattr("sglang.srt.utils.common.cpu_has_amx_support", lambda: amx)
    with starting.rank(arguments(), PORTS) as start:
        assert start.layout == expected


def test_a_layout_that_the_attention_backend_cannot_read_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KVCACHED_LAYOUT", "block")
    monkeypatch.setattr(runtime_context, "attention_backends", lambda: ("trtllm_mha", "trtllm_mha"))
    with pytest.raises(UnsupportedError, match="trtllm_mha"), starting.rank(arguments(), PORTS) as start:
        _ = start.layout
    assert "this engine cannot start" in caplog.text
