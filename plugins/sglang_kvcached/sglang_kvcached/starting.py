"""One rank's start inside SGLang: its turn, its device, its account; until its first request."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kvcached_core.driver import nvml
from kvcached_core.driver.base import Driver
from kvcached_core.driver.registry import open_driver
from kvcached_core.errors import ConfigError, InvariantError, KVCachedError
from kvcached_core.ledger import Account, Runtime
from kvcached_core.startup.private_memory import PrivateMemory, reserved_bytes
from kvcached_core.startup.rank_start import Rank, Start
from sglang_kvcached import layouts, support, weights

_log = logging.getLogger(__name__)

_current: RankStart | None = None


def current() -> RankStart:
    """Return the start of this process's rank. Raises InvariantError where none is under way or done."""
    if _current is None:
        raise InvariantError("an elastic KV cache is made by a scheduler that is starting, and none is here")
    return _current


@contextmanager
def rank(server_args: Any, port_args: Any) -> Iterator[RankStart]:
    """Start the rank of this process; if anything fails, it leaves the ledger with everything given back."""
    global _current
    support.adopt_logging()
    options = server_args.resolved_dict()
    try:
        support.refuse(options)
        support.warn_of_untried(options)
        _current = RankStart(options, port_args)
        _current.make_room_for_context()
        yield _current
    except BaseException as error:
        if isinstance(error, KVCachedError):
            _log.error("kvcached: this engine cannot start: %s", error)
        _give_up()
        raise


def require_elastic(scheduler: Any) -> None:
    """End the start of a scheduler that is complete. Raises InvariantError if it is not elastic."""
    from sglang_kvcached import process_state

    start = current()
    process_state.begin_service(scheduler, start)
    if problem := start.problem() or process_state.problem(scheduler):
        raise InvariantError(f"this engine was asked to be elastic and is not: {problem}")
    start.end()


def _give_up() -> None:
    global _current
    from sglang_kvcached import process_state

    start, _current = _current, None
    try:
        process_state.close()
        if start is not None:
            start.close()
    except Exception:
        _log.exception("kvcached: not everything was given back; it is when this process ends")


class RankStart:
    """What the rank of this process is, and has."""

    def __init__(self, options: dict[str, Any], port_args: Any) -> None:
        """`options` are SGLang's resolved arguments by name. Raises ConfigError."""
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
        who = Rank("sglang", self.instance, self.rank, str(name), str(options["model_path"]))
        self._start = Start(self.settings, who, self._gather)

    # -- what others use ---------------------------------------------------------------------------------

    @property
    def on_host(self) -> bool:
        return str(self.device.type) == "cpu"

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
        """What the process takes outside its KV cache. Raises InvariantError before the device is open."""
        return self._start.private

    @property
    def runtime(self) -> Runtime:
        return Runtime.open(self.settings.runtime_dir or None)

    @property
    def capacity_bytes(self) -> int:
        return self.driver.memory().total_bytes

    @property
    def cpu_group(self) -> Any:
        """The gloo group of the ranks that share one queue of requests."""
        from sglang.srt.runtime_context import get_parallel

        return get_parallel().attn_tp_group.cpu_group

    @property
    def layout(self) -> str:
        """How a token's keys and values lie, as layouts.chosen() says. Raises UnsupportedError."""
        from sglang.srt.runtime_context import attention_backends
        from sglang.srt.utils.common import cpu_has_amx_support

        amx = self.on_host and bool(cpu_has_amx_support())
        return layouts.chosen(self.settings.layout, attention_backends(), amx)

    def limit_bytes(self) -> int:
        """Return what this rank may hold at most when it starts."""
        return self._start.limit_bytes()

    def virtual_bytes(self) -> int:
        """Return how much address space to reserve: the same on every rank."""
        mine = max(self.settings.virtual.of(self.capacity_bytes), self.limit_bytes())
        return int(min(self._gather(mine)))

    def note_virtual(self, size_bytes: int) -> int:
        """Remember, and return, what SGLang was told."""
        self._virtual_bytes = size_bytes
        return size_bytes

    def set_floor(self, floor_bytes: int) -> None:
        """Set the exact floor. Raises CapacityError with the numbers if it does not fit."""
        self._start.set_floor(floor_bytes)

    # -- in this order -----------------------------------------------------------------------------------

    def make_room_for_context(self) -> None:
        """On a GPU, wait until it has room for a context, before one is made. Raises CapacityError."""
        os.environ.setdefault("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "false")  # others share the devices
        if self._options["device"] != "cuda":
            return
        uuid = nvml.uuid_of(int(self._gpu_index or 0))
        if uuid is not None:
            self._start.make_room_for_context(uuid, lambda: nvml.memory_of(uuid))

    def wait_for_room(self, runner: Any) -> None:
        """Open the device and return once this rank may load; `runner` is SGLang's ModelRunner.

        Raises CapacityError with the numbers on all ranks if one of them is refused.
        """
        model, ranks = runner.model_config, self._options["tp_size"]
        self.device = torch.device("cpu" if runner.device == "cpu" else f"{runner.device}:{runner.gpu_id}")
        self.longest_tokens = int(model.context_len)
        self._driver = self._open()
        uuid, index = self._driver.identity().uuid, self.device
        private = PrivateMemory(
            None if self.on_host else lambda: reserved_bytes(index),
            lambda: nvml.process_bytes(uuid),
            lambda: self.account.ready_bytes,
        )
        self._start.enter(self._driver.identity(), self.capacity_bytes, private, _mapped_bytes)
        self._start.wait_for_room(
            self._driver.memory,
            weights.private_bytes(model, str(self._options["load_format"]), ranks, self.on_host),
            weights.longest_request_bytes(model, self.world_size, self._number_bytes(model)),
            self.on_host,
        )

    def problem(self) -> str:
        """Say which step of the start did not happen, or return an empty text."""
        if self._driver is None:
            return "its turn to load was not waited for"
        if not self._virtual_bytes:
            return "the size of its KV cache was not asked for"
        return ""

    def end(self) -> None:
        """All is loaded."""
        self._start.end(0 if self.on_host else weights.DEVICE_BYTES)

    def close(self) -> None:
        """Leave the ledger, with everything given back; may be repeated."""
        self._start.close()

    # -- parts -------------------------------------------------------------------------------------------

    def _open(self) -> Driver:
        """Open the driver on this rank's device."""
        name = self.settings.driver
        if name == "auto":
            name = "host" if self.on_host else "cuda"
        if (name == "host") != self.on_host:
            raise ConfigError(
                f"kvcached.driver={name!r}: this engine runs on {self.device.type}, expected "
                f"{'host' if self.on_host else 'cuda'} or auto"
            )
        index = self.device.index or 0
        if not self.on_host:
            return open_driver(name, index, 0)
        with_all = open_driver(name, index, 0)
        total_bytes = with_all.memory().total_bytes
        with_all.close()
        return open_driver(name, index, self.settings.host_capacity.of(total_bytes))

    def _number_bytes(self, model: Any) -> int:
        dtype = str(self._options["kv_cache_dtype"])
        return 1 if dtype.startswith("fp8") else int(model.dtype.itemsize)

    def _gather(self, mine: Any) -> list[Any]:
        """Return what every rank that loads this model says, by rank."""
        from sglang.srt.runtime_context import get_parallel

        if int(get_parallel().tp_size) == 1:
            return [mine]
        group = get_parallel().world_group
        said: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(said, mine, group=group.cpu_group)
        return said


def _mapped_bytes() -> int:
    from sglang_kvcached import process_state

    return process_state.mapped_bytes()
