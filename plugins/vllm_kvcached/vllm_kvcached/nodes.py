"""Ranks on other nodes: a line to each node, through the store where vLLM's ranks have met.

An engine on one node makes nothing of this. Nodes are numbered as by vLLM's --node-rank.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import kvcached_core
from kvcached_core.config import Config
from kvcached_core.errors import LedgerError, UnsupportedError
from kvcached_core.ledger import Runtime
from kvcached_core.ledger.remote.agent import NodeAgent
from kvcached_core.ledger.remote.link import NodeLink

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MEET_SECONDS = 60.0  # ranks that have met come here within seconds of each other
_FOR_EVER = timedelta(days=20)  # the longest that the store can wait at once


def spans_nodes(vllm_config: VllmConfig) -> bool:
    """Say whether the engine has ranks on several nodes."""
    return bool(vllm_config.parallel_config.nnodes_within_dp > 1)


def near_ranks(vllm_config: VllmConfig) -> range:
    """Return the ranks on this node."""
    parallel = vllm_config.parallel_config
    first = parallel.node_rank_within_dp * parallel.local_world_size
    return range(first, first + parallel.local_world_size)


@contextlib.contextmanager
def _as_ledger_error(vllm_config: VllmConfig) -> Iterator[None]:
    """Raise what fails of the store as LedgerError."""
    try:
        yield
    except RuntimeError as error:  # torch's DistError
        parallel = vllm_config.parallel_config
        where = f"{parallel.master_addr}:{parallel.master_port}"
        raise LedgerError(f"the store of the ranks at {where}: {error}") from error


def _store(vllm_config: VllmConfig) -> Any:
    """Return a connection to the store that rank 0 holds for vLLM; it serves one call at a time."""
    from torch.distributed import TCPStore

    parallel = vllm_config.parallel_config
    with _as_ledger_error(vllm_config):
        return TCPStore(parallel.master_addr, parallel.master_port, is_master=False, wait_for_workers=False,
                        timeout=timedelta(seconds=MEET_SECONDS))  # fmt: skip


class StoreTransport:
    """One end of a line: two queues in the store, one for each way."""

    def __init__(self, vllm_config: VllmConfig, outgoing: str, incoming: str) -> None:
        self._config = vllm_config
        self._sender, self._receiver = _store(vllm_config), _store(vllm_config)
        self._outgoing, self._incoming = outgoing, incoming

    def send(self, message: bytes) -> None:
        """See Post."""
        with _as_ledger_error(self._config):
            self._sender.queue_push(self._outgoing, message)

    def receive(self, seconds: float | None = None) -> bytes:
        """See Post; the store logs a warning of its own where the time passes."""
        from torch.distributed import DistStoreError

        self._receiver.set_timeout(_FOR_EVER if seconds is None else timedelta(seconds=seconds))
        with _as_ledger_error(self._config):
            while True:
                try:
                    return bytes(self._receiver.queue_pop(self._incoming))
                except DistStoreError:  # the time has passed
                    if seconds is not None:
                        raise

    def interrupt(self) -> None:
        """See Post."""
        with _as_ledger_error(self._config):
            self._sender.queue_push(self._incoming, b"")


def _down(node: int) -> str:
    return f"kvcached/down/{node}"


def _up(node: int) -> str:
    return f"kvcached/up/{node}"


# -- in this order ---------------------------------------------------------------------------------------


def meet(vllm_config: VllmConfig, settings: Config, rank: int, seconds: float = MEET_SECONDS) -> None:
    """Return once all nodes are known to hold the same kind of cache. Each rank calls it before it gathers.

    Raises UnsupportedError naming a node that does not, or does otherwise.
    """
    if not spans_nodes(vllm_config):
        return
    parallel, store = vllm_config.parallel_config, _store(vllm_config)
    here = parallel.node_rank_within_dp
    mine = {"kvcached-core": kvcached_core.__version__, "page_size": str(settings.page_size or "auto"),
            "layout": settings.layout}  # fmt: skip
    with _as_ledger_error(vllm_config):
        if rank == near_ranks(vllm_config)[0]:
            store.set(f"kvcached/hello/{here}", json.dumps(mine))
    for node in range(parallel.nnodes_within_dp):
        if node != here:
            _compare(node, mine, _hello(vllm_config, store, node, seconds))


def _hello(vllm_config: VllmConfig, store: Any, node: int, seconds: float) -> dict[str, str]:
    key = f"kvcached/hello/{node}"
    try:
        with _as_ledger_error(vllm_config):
            store.wait([key], timedelta(seconds=seconds))
            said: dict[str, str] = json.loads(store.get(key))
            return said
    except LedgerError as error:
        raise UnsupportedError(
            f"node {node} has not said within {seconds:g} s that its cache is elastic: start it with "
            f"--kv-cache-backend kvcached too, and the same version of vllm-kvcached ({error})"
        ) from error


def _compare(node: int, mine: dict[str, str], theirs: dict[str, str]) -> None:
    other = [f"{name} {theirs.get(name)}, and here it is {value}" for name, value in mine.items()
             if theirs.get(name) != value]  # fmt: skip
    if other:
        raise UnsupportedError(f"node {node} has {'; '.join(other)}: give all nodes the same")


def far_end(vllm_config: VllmConfig, settings: Config, instance: str, rank: int) -> NodeAgent | None:
    """Return the end of the line on this node, started, if this rank's process is to hold it.

    All ranks of the node are described.
    """
    node, ranks = vllm_config.parallel_config.node_rank_within_dp, near_ranks(vllm_config)
    if node == 0 or rank != ranks[0]:
        return None
    post = StoreTransport(vllm_config, _up(node), _down(node))
    runtime = Runtime.open(settings.runtime_dir or None)
    end = NodeAgent(post, runtime, instance, set(ranks), time.monotonic)
    end.start()
    return end


def home_ends(vllm_config: VllmConfig, clock: Callable[[], float]) -> list[NodeLink]:
    """Return the scheduler's ends of the lines to all other nodes; none where there is one node.

    Raises LedgerError naming a node whose first message does not come.
    """
    ends = [
        NodeLink(StoreTransport(vllm_config, _down(node), _up(node)), node, clock)
        for node in range(1, vllm_config.parallel_config.nnodes_within_dp)
    ]
    for end in ends:
        end.start()
    return ends
