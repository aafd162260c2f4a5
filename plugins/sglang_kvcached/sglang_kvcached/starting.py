"""The start of one rank inside SGLang: its device, its account in the ledger, its wait for memory."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kvcached_core.driver import nvml
from kvcached_core.driver.base import Driver
from kvcached_core.driver.registry import is_host, open_for_engine
from kvcached_core.errors import InvariantError, KVCachedError
from kvcached_core.ledger import Account, Runtime, SchedulerView
from kvcached_core.startup import estimates
from kvcached_core.startup.private_memory import PrivateMemory, reserved_bytes
from kvcached_core.startup.rank_start import RankIdentity, RankStartup
from sglang_kvcached import layouts, process_state, startup_check, support, weights
from sglang_kvcached.counters import Counters
from sglang_kvcached.demand import Demand
from sglang_kvcached.prefix_cache_view import PrefixCacheView
from sglang_kvcached.rank_memory import RankMemory
from sglang_kvcached.rank_sync import DistributedRanks, RankGroup, RankSync, SingleRank
from sglang_kvcached.scheduler_memory import SchedulerMemory
from sglang_kvcached.wake import Waker

_log = logging.getLogger(__name__)

_current: RankStart | None = None


def current() -> RankStart:
    """Return the start of this process's rank. Raises InvariantError outside `rank()`."""
    if _current is None:
        raise InvariantError("only a scheduler that started with kvcached can make an elastic KV cache")
    return _current


@contextmanager
def rank(server_args: Any, port_args: Any) -> Iterator[RankStart]:
    """Start the rank of this process. If a step fails, give all memory back and leave the ledger."""
    global _current
    support.adopt_logging()
    options = server_args.resolved_dict()
    try:
        support.refuse(options)
        support.warn_of_untested(options)
        _current = RankStart(options, port_args)
        process_state.use(RankMemory(_current))
        _current.make_room_for_context()
        yield _current
    except BaseException as error:
        if isinstance(error, KVCachedError):
            _log.error("kvcached: this engine cannot start: %s", error)
        _give_up()
        raise


def finish(scheduler: Any) -> None:
    """End the start of a complete scheduler. Raises InvariantError if it is not elastic."""
    start = current()
    begin_settling(scheduler, start)
    if problem := start.missing_step() or startup_check.why_not_elastic(scheduler):
        raise InvariantError(f"this engine was asked to be elastic and is not: {problem}")
    start.end()


def begin_settling(scheduler: Any, start: RankStart, clock: Callable[[], float] = time.monotonic) -> None:
    """Create the scheduler memory of a complete scheduler; from now on memory is mapped and unmapped.

    Every rank calls this.
    """
    rank_memory = process_state.rank_memory()
    if not rank_memory.has_owner:
        return  # why_not_elastic() names the reason
    group: RankGroup = SingleRank()
    if start.world_size > 1:
        group = DistributedRanks(start.cpu_group)
        group.barrier()  # all ranks have described their geometry to the ledger now
    rank_memory.account.grow_with(range(start.world_size))
    view = (
        SchedulerView.find(start.runtime, start.instance, start.world_size, clock)
        if start.rank == 0
        else None
    )
    rank_memory.pool.start()
    rank_sync = RankSync(view, group, bool(scheduler.server_args.sleep_on_idle), clock)
    waker = None if view is None else Waker(view, scheduler.idle_sleeper, clock)
    memory = SchedulerMemory(
        rank_memory,
        Demand(scheduler),
        PrefixCacheView(scheduler, rank_memory.page_pools),
        rank_sync,
        waker,
        Counters() if view is None else Counters(view.count, view.report),
        _streams(scheduler),
    )
    if waker is not None:
        waker.start(lambda: memory.governor.deadline)
    process_state.use(rank_memory, memory)


def _streams(scheduler: Any) -> Callable[[], tuple[int, tuple[int, ...]]]:
    """Return a function that returns the stream of a scheduler's steps, and its other streams."""
    if is_host(torch.device(scheduler.device).type):
        return lambda: (0, ())
    others = tuple(int(s.cuda_stream) for s in (scheduler.forward_stream, scheduler.copy_stream))
    return lambda: (int(torch.cuda.current_stream().cuda_stream), others)


def _give_up() -> None:
    global _current
    start, _current = _current, None
    try:
        process_state.close()
        if start is not None:
            start.close()
    except Exception:
        _log.exception("kvcached: some memory was not given back; the system frees it when this process ends")


class RankStart:
    """The rank of this process: its identity, its driver and its account, in the order of its start."""

    def __init__(self, options: dict[str, Any], port_args: Any) -> None:
        """`options` are SGLang's resolved arguments by name. Raises ConfigError for an illegal setting."""
        from sglang.srt.runtime_context import get_device, get_parallel

        parallel = get_parallel()
        replica = f"-{parallel.dp_rank or 0}-{parallel.attn_dp_rank}"
        self.settings = support.settings()
        self.instance = support.instance(port_args) + replica
        self.rank = int(parallel.attn_tp_rank)
        self.world_size = int(parallel.attn_tp_size)  # ranks that share one queue of requests
        self.device = torch.device("cpu")
        self.longest_tokens = 0
        self._options = options
        self._gpu_index = get_device().gpu_id
        self._driver: Driver | None = None
        self._virtual_bytes = 0
        name = options["served_model_name"] or options["model_path"]
        identity = RankIdentity("sglang", self.instance, self.rank, str(name), str(options["model_path"]))
        self._start = RankStartup(self.settings, identity, self._gather)

    # -- for other modules -------------------------------------------------------------------------------

    @property
    def on_host(self) -> bool:
        """Say whether the engine runs on the CPU."""
        return is_host(self.device.type)

    @property
    def driver(self) -> Driver:
        """The driver of the rank's device. Raises InvariantError before it is open."""
        if self._driver is None:
            raise InvariantError("the driver is opened before the weights are loaded")
        return self._driver

    @property
    def account(self) -> Account:
        """The rank's account in its device's ledger. Raises InvariantError before it is attached."""
        return self._start.account

    @property
    def private(self) -> PrivateMemory:
        """The process's memory outside its KV cache. Raises InvariantError before the device is open."""
        return self._start.private

    @property
    def runtime(self) -> Runtime:
        """The runtime directory with the ledgers."""
        return Runtime.open(self.settings.runtime_dir or None)

    @property
    def capacity_bytes(self) -> int:
        """The memory of the rank's device."""
        return self.driver.memory().total_bytes

    @property
    def cpu_group(self) -> Any:
        """The gloo group of the ranks that share one queue of requests."""
        from sglang.srt.runtime_context import get_parallel

        return get_parallel().attn_tp_group.cpu_group

    @property
    def layout(self) -> str:
        """The layout that `layouts.chosen` returns. Raises UnsupportedError."""
        from sglang.srt.runtime_context import attention_backends
        from sglang.srt.utils.common import cpu_has_amx_support

        amx = self.on_host and bool(cpu_has_amx_support())
        return layouts.chosen(self.settings.layout, attention_backends(), amx)

    def limit_bytes(self) -> int:
        """Return the bytes that this rank may hold at most when it starts."""
        return self._start.limit_bytes()

    def virtual_bytes(self) -> int:
        """Return the bytes of address space to reserve, the same on every rank."""
        mine = max(self.settings.virtual.of(self.capacity_bytes), self.limit_bytes())
        return int(min(self._gather(mine)))

    def note_virtual_bytes(self, size_bytes: int) -> int:
        """Remember the bytes that SGLang was told for its KV cache, and return them."""
        self._virtual_bytes = size_bytes
        return size_bytes

    def set_floor(self, floor_bytes: int) -> None:
        """Set the exact floor, in bytes. Raises CapacityError, with the numbers, if it does not fit."""
        self._start.set_floor(floor_bytes)

    # -- the start, in this order ------------------------------------------------------------------------

    def make_room_for_context(self) -> None:
        """On a GPU, wait for room for a CUDA context before this process makes one. Raises CapacityError."""
        os.environ.setdefault("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "false")  # devices are shared
        if is_host(self._options["device"]):
            return
        uuid = nvml.uuid_of(int(self._gpu_index or 0))
        if uuid is not None:
            self._start.make_room_for_context(uuid, lambda: nvml.memory_of(uuid))

    def wait_for_room(self, runner: Any) -> None:
        """Open the device and wait until this rank may load; `runner` is SGLang's ModelRunner.

        Raises CapacityError, with the numbers, on all ranks if one of them is refused.
        """
        model, ranks = runner.model_config, self._options["tp_size"]
        self.device = torch.device("cpu" if runner.device == "cpu" else f"{runner.device}:{runner.gpu_id}")
        self.longest_tokens = int(model.context_len)
        self._driver = open_for_engine(self.settings, self.device.type, self.device.index)
        uuid, index = self._driver.identity().uuid, self.device
        private = PrivateMemory(
            None if self.on_host else lambda: reserved_bytes(index),
            lambda: nvml.process_bytes(uuid),
            lambda: self.account.ready_bytes,
        )
        self._start.enter(self._driver.identity(), self.capacity_bytes, private, process_state.mapped_bytes)
        self._start.wait_for_room(
            self._driver.memory,
            weights.private_bytes(model, str(self._options["load_format"]), ranks, self.on_host),
            weights.longest_request_bytes(model, self.world_size, self._number_bytes(model)),
            self.on_host,
        )

    def missing_step(self) -> str:
        """Return a sentence that names the skipped step of the start, or an empty text."""
        if self._driver is None:
            return "it loaded its weights without waiting for its turn"
        if not self._virtual_bytes:
            return "SGLang did not ask for the size of its KV cache"
        return ""

    def end(self) -> None:
        """Note that the engine is loaded."""
        self._start.end(0 if self.on_host else estimates.DEVICE_BYTES)

    def close(self) -> None:
        """Give all memory back and leave the ledger. A second call does nothing."""
        self._start.close()

    # -- parts -------------------------------------------------------------------------------------------

    def _number_bytes(self, model: Any) -> int:
        dtype = str(self._options["kv_cache_dtype"])
        return 1 if dtype.startswith("fp8") else int(model.dtype.itemsize)

    def _gather(self, mine: Any) -> list[Any]:
        """Return the value of every rank that loads this model, by rank."""
        from sglang.srt.runtime_context import get_parallel

        if int(get_parallel().tp_size) == 1:
            return [mine]
        group = get_parallel().world_group
        gathered: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(gathered, mine, group=group.cpu_group)
        return gathered
