"""Links to ranks on other nodes, through the torch.distributed store in which vLLM's ranks register.

An engine on one node makes no link. Nodes are numbered by vLLM's --node-rank.
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

HELLO_SECONDS = 60.0  # all ranks reach this check within seconds of each other
_FOR_EVER = timedelta(days=20)  # the longest timeout of the store


def spans_nodes(vllm_config: VllmConfig) -> bool:
    """Say whether the engine has ranks on several nodes."""
    return bool(vllm_config.parallel_config.nnodes_within_dp > 1)


def local_ranks(vllm_config: VllmConfig) -> range:
    """Return the ranks on this node."""
    parallel = vllm_config.parallel_config
    first = parallel.node_rank_within_dp * parallel.local_world_size
    return range(first, first + parallel.local_world_size)


@contextlib.contextmanager
def _as_ledger_error(vllm_config: VllmConfig) -> Iterator[None]:
    """Raise the store's errors as LedgerError."""
    try:
        yield
    except RuntimeError as error:  # torch's DistError
        parallel = vllm_config.parallel_config
        where = f"{parallel.master_addr}:{parallel.master_port}"
        raise LedgerError(f"the store of the ranks at {where}: {error}") from error


def _store(vllm_config: VllmConfig) -> Any:
    """Return a connection to the store that rank 0 serves. A connection carries one call at a time."""
    from torch.distributed import TCPStore

    parallel = vllm_config.parallel_config
    with _as_ledger_error(vllm_config):
        return TCPStore(parallel.master_addr, parallel.master_port, is_master=False, wait_for_workers=False,
                        timeout=timedelta(seconds=HELLO_SECONDS))  # fmt: skip


class StoreTransport:
    """One side of a link to another node: two queues in the store, one for each direction."""

    def __init__(self, vllm_config: VllmConfig, outgoing: str, incoming: str) -> None:
        self._config = vllm_config
        self._sender, self._receiver = _store(vllm_config), _store(vllm_config)
        self._outgoing, self._incoming = outgoing, incoming

    def send(self, message: bytes) -> None:
        """See Transport."""
        with _as_ledger_error(self._config):
            self._sender.queue_push(self._outgoing, message)

    def receive(self, seconds: float | None = None) -> bytes:
        """See Transport. The store also logs a warning when the time runs out."""
        from torch.distributed import DistStoreError

        self._receiver.set_timeout(_FOR_EVER if seconds is None else timedelta(seconds=seconds))
        with _as_ledger_error(self._config):
            while True:
                try:
                    return bytes(self._receiver.queue_pop(self._incoming))
                except DistStoreError:  # the time ran out
                    if seconds is not None:
                        raise

    def interrupt(self) -> None:
        """See Transport."""
        with _as_ledger_error(self._config):
            self._sender.queue_push(self._incoming, b"")


def _to_node(node: int) -> str:
    return f"kvcached/down/{node}"


def _from_node(node: int) -> str:
    return f"kvcached/up/{node}"


# -- called in this order ---------------------------------------------------------------------------------


def require_same_cache(
    vllm_config: VllmConfig, settings: Config, rank: int, seconds: float = HELLO_SECONDS
) -> None:
    """Wait until all nodes have announced the same kind of cache. Every rank calls this first.

    Raises UnsupportedError, naming the node, if a node announces nothing within `seconds` or another kind.
    """
    if not spans_nodes(vllm_config):
        return
    parallel, store = vllm_config.parallel_config, _store(vllm_config)
    here = parallel.node_rank_within_dp
    mine = {"kvcached-core": kvcached_core.__version__, "page_size": str(settings.page_size or "auto"),
            "layout": settings.layout}  # fmt: skip
    with _as_ledger_error(vllm_config):
        if rank == local_ranks(vllm_config)[0]:
            store.set(f"kvcached/hello/{here}", json.dumps(mine))
    for node in range(parallel.nnodes_within_dp):
        if node != here:
            _require_equal(node, mine, _read_hello(vllm_config, store, node, seconds))


def _read_hello(vllm_config: VllmConfig, store: Any, node: int, seconds: float) -> dict[str, str]:
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


def _require_equal(node: int, mine: dict[str, str], theirs: dict[str, str]) -> None:
    other = [f"{name} {theirs.get(name)}, and here it is {value}" for name, value in mine.items()
             if theirs.get(name) != value]  # fmt: skip
    if other:
        raise UnsupportedError(f"node {node} has {'; '.join(other)}: give all nodes the same")


def start_agent(vllm_config: VllmConfig, settings: Config, instance: str, rank: int) -> NodeAgent | None:
    """Start and return the node's agent. Only the first rank of a node other than 0 has one: else None.

    Before this call, all ranks of the node must have described their geometry to the ledger.
    """
    node, ranks = vllm_config.parallel_config.node_rank_within_dp, local_ranks(vllm_config)
    if node == 0 or rank != ranks[0]:
        return None
    transport = StoreTransport(vllm_config, _from_node(node), _to_node(node))
    runtime = Runtime.open(settings.runtime_dir or None)
    agent = NodeAgent(transport, runtime, instance, set(ranks), time.monotonic)
    agent.start()
    return agent


def start_links(vllm_config: VllmConfig, clock: Callable[[], float]) -> list[NodeLink]:
    """Start and return the scheduler's links to all other nodes.

    Raises LedgerError naming a node whose first message does not arrive.
    """
    links = [
        NodeLink(StoreTransport(vllm_config, _to_node(node), _from_node(node)), node, clock)
        for node in range(1, vllm_config.parallel_config.nnodes_within_dp)
    ]
    for link in links:
        link.start()
    return links
