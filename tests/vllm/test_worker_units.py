"""The parts of the worker without an engine, on host memory: allocation, addresses, mapping, cleanup."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor

from kvcached_core.errors import CapacityError, ConfigError, InvariantError
from kvcached_core.ledger import Runtime, snapshot
from kvcached_core.plan import Plan
from tests.vllm.engines import BLOCK_TOKENS, vllm_config
from vllm_kvcached.worker import _KVCacheAllocation, _modest, _others_may_give_back, _part_of_start
from vllm_kvcached.worker_memory import WorkerMemory

LAYERS, HEADS, HEAD_SIZE = 4, 4, 32
LAYER_BYTES = 2 * 4 * BLOCK_TOKENS * HEADS * HEAD_SIZE  # of one block: keys and values in float32
BLOCK_BYTES = LAYERS * LAYER_BYTES
MIB = 1 << 20
CPU = torch.device("cpu")
SPEC = FullAttentionSpec(
    block_size=BLOCK_TOKENS, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.float32
)
SPECS: Any = {f"layer.{n}": SPEC for n in range(LAYERS)}
SETTINGS = {"host_capacity": "256MiB", "limit": "64MiB", "headroom": "0", "spare": "2MiB"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The configuration of every worker in this file."""
    return vllm_config(tmp_path_factory.mktemp("model"))


@pytest.fixture
def memory(config: Any, tmp_path: Path) -> Iterator[WorkerMemory]:
    """The memory of a worker with an open driver, in its own ledger."""
    made = worker(config, runtime_dir=str(tmp_path / "run"))
    made.open(CPU)
    yield made
    made.close()


def worker(config: Any, explicit_bytes: int | None = None, **settings: Any) -> WorkerMemory:
    """Return a worker's memory with these settings."""
    config.additional_config = {"kvcached": {**SETTINGS, **settings}}
    config.cache_config.kv_cache_memory_bytes = explicit_bytes
    return WorkerMemory(config, 0)


def kv_config(blocks: int) -> KVCacheConfig:
    """Return vLLM's cache configuration for this many blocks, with the block outermost."""
    tensor = KVCacheTensor(
        size=blocks * BLOCK_BYTES, layers=list(SPECS), layer_stride=LAYER_BYTES, block_stride=BLOCK_BYTES
    )
    made = KVCacheConfig(
        num_blocks=blocks, kv_cache_tensors=[tensor], kv_cache_groups=[KVCacheGroupSpec(list(SPECS), SPEC)]
    )
    made.kv_cache_layout = "BLHNC"
    return made


def begin(memory: WorkerMemory) -> torch.Tensor:
    """Run a worker's start to its end; return its KV cache."""
    memory.wait_for_room()
    size = memory.virtual_bytes(SPECS)
    tensor = memory.allocate(kv_config(size // BLOCK_BYTES), size)
    memory.begin_service(0)
    return tensor


def test_only_the_allocation_of_the_kv_cache_is_replaced() -> None:
    ours = torch.ones(8, dtype=torch.int8)
    with _KVCacheAllocation(1000, lambda: ours) as allocation:
        assert torch.zeros(1000, dtype=torch.int8) is ours
        assert torch.zeros(1000, dtype=torch.int8, device="cpu") is ours
        for other in (
            torch.zeros(999, dtype=torch.int8),
            torch.zeros(1000, dtype=torch.uint8),
            torch.ones(3),
        ):
            assert other is not ours
    assert allocation.answered == 2
    assert torch.zeros(1000, dtype=torch.int8) is not ours


def test_vllms_check_at_start_passes_and_its_setting_is_restored() -> None:
    config: Any = SimpleNamespace(cache_config=SimpleNamespace(gpu_memory_utilization=0.9))
    with pytest.raises(ZeroDivisionError), _modest(config):
        assert config.cache_config.gpu_memory_utilization == 0.01
        raise ZeroDivisionError
    assert config.cache_config.gpu_memory_utilization == 0.9


def test_memory_that_other_engines_give_back_during_profiling_is_no_error() -> None:
    """vLLM asserts that free memory does not grow during profiling."""
    snapshot: Any = SimpleNamespace(free_memory=5, total_memory=80)
    with pytest.raises(ZeroDivisionError), _others_may_give_back(snapshot):
        assert snapshot.free_memory >= 80
        raise ZeroDivisionError
    assert snapshot.free_memory == 5


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CapacityError("no room"), "cannot start: no room"),
        (ValueError("wrong"), ""),
        (KeyboardInterrupt(), ""),
    ],
)
def test_a_failed_start_leaves_the_ledger_and_logs_its_reason_once(
    error: BaseException, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Worker:
        def __init__(self) -> None:
            self.kv_memory = SimpleNamespace(close=self.close)
            self.closed = 0

        def close(self) -> None:
            self.closed += 1
            raise OSError("the ledger is gone")

        @_part_of_start
        def load(self, fails: bool) -> int:
            if fails:
                raise error
            return 7

    worker = Worker()
    assert worker.load(fails=False) == 7 and worker.closed == 0
    with pytest.raises(type(error)) as raised:
        worker.load(fails=True)
    assert raised.value is error and worker.closed == 1
    assert [r.getMessage() for r in caplog.records if "cannot start" in r.getMessage()] == (
        [f"kvcached: this engine {line}"] if line else []
    )
    assert "given back" in caplog.text


def test_a_driver_for_another_device_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match=r"kvcached\.driver='cuda': this engine runs on cpu, expected host"):
        worker(config, driver="cuda").open(CPU)


def test_layouts_with_the_block_outermost_are_preferred_unless_vllm_chooses(config: Any) -> None:
    names = ["LBHNC", "BLHNC", "LHBNC", "BHLNC"]
    assert worker(config).preferred_layouts(names) == ["BLHNC", "BHLNC", "LBHNC", "LHBNC"]
    assert worker(config, layout="engine").preferred_layouts(names) == names


@pytest.mark.parametrize(
    ("settings", "size_bytes"),
    [
        ({}, 256 * MIB),
        ({"virtual": "50%"}, 128 * MIB),
        ({"virtual": "1MiB"}, 64 * MIB),  # never less than the limit
        ({"virtual": "1MiB", "limit": "50%"}, 128 * MIB),
        ({"max_blocks": 1024}, 1024 * BLOCK_BYTES),
    ],
)
def test_the_reserved_addresses_cover_the_limit(
    config: Any, settings: dict[str, Any], size_bytes: int
) -> None:
    memory = worker(config, **settings)
    memory.open(CPU)
    assert memory.virtual_bytes(SPECS) == size_bytes
    memory.close()


def test_kv_cache_memory_bytes_is_a_limit_too(config: Any, tmp_path: Path) -> None:
    memory = worker(config, explicit_bytes=32 * MIB, virtual="1MiB", runtime_dir=str(tmp_path / "run"))
    memory.open(CPU)
    assert memory.virtual_bytes(SPECS) == 32 * MIB
    begin(memory)
    (device,) = snapshot(Runtime(tmp_path / "run"))
    assert device.owners[0].limit_applied == 32 * MIB
    memory.close()


def test_a_limit_under_one_request_of_the_maximum_length_is_refused(config: Any, tmp_path: Path) -> None:
    memory = worker(config, limit="2MiB", runtime_dir=str(tmp_path / "run"))
    memory.open(CPU)
    with pytest.raises(ConfigError, match=r"one request of 512 tokens needs: raise kvcached\.limit"):
        begin(memory)
    memory.close()


def test_i11_a_worker_maps_as_planned_and_leaves_no_memory_behind(
    memory: WorkerMemory, tmp_path: Path
) -> None:
    tensor = begin(memory)
    assert tensor.dtype is torch.int8 and tensor.numel() == 256 * MIB
    (device,) = snapshot(Runtime(tmp_path / "run"))
    owner = device.owners[0]
    assert (owner.live, owner.rank, owner.limit_applied) == (True, 0, 64 * MIB)
    assert 0 < owner.floor_applied <= owner.limit_applied
    tensor[:BLOCK_BYTES] = 7  # I7: block 0 has memory from the start
    memory.apply(Plan(0, (), (), 0))
    memory.check()
    assert memory.stats()["mapped"] >= 1
    memory.close()
    memory.close()
    assert all(not left.live for left in snapshot(Runtime(tmp_path / "run"))[0].owners)


def test_i5_memory_that_no_plan_has_mapped_faults(config: Any, tmp_path: Path) -> None:
    memory = worker(config, runtime_dir=str(tmp_path / "run"))
    memory.open(CPU)
    tensor = begin(memory)
    child = os.fork()
    if child == 0:  # the fault kills this child process
        faulthandler.disable()
        tensor[-1] = 1
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGBUS)
    memory.close()


def test_the_allocation_must_be_seen_exactly_once(memory: WorkerMemory) -> None:
    memory.require_allocated(1)
    for times in (0, 2):
        with pytest.raises(InvariantError, match=f"was seen {times} times"):
            memory.require_allocated(times)
    begin(memory)
    with pytest.raises(InvariantError, match="allocated its KV cache twice"):
        memory.allocate(kv_config(8), 8 * BLOCK_BYTES)


def test_closing_at_any_point_of_the_start_gives_everything_back(config: Any) -> None:
    never_opened = worker(config)
    never_opened.close()
    for steps in (1, 2):
        opened = worker(config)
        opened.open(CPU)
        if steps == 2:
            opened.wait_for_room()
        opened.close()
        opened.close()
        assert not [owner for device in snapshot(Runtime.open(None)) for owner in device.owners if owner.live]
    with pytest.raises(InvariantError, match="opened with the device"):
        opened.virtual_bytes(SPECS)
