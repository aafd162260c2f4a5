"""Links between nodes through the store of vLLM's ranks, and nodes whose caches differ."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed
from torch.distributed import TCPStore

import kvcached_core
from kvcached_core import config
from kvcached_core.errors import ConfigError, LedgerError, UnsupportedError
from kvcached_core.ledger import Runtime, SchedulerView, SlotGeometry
from kvcached_core.ledger.remote.agent import NodeAgent
from tests.ledger.helpers import ATTACHED, attach, die, engine_usage, hold, readable
from tests.vllm.elastic import running
from tests.vllm.engines import vllm_config
from vllm_kvcached import nodes, scheduler_memory

BOUND_SECONDS = 20.0
SETTINGS = config.load({}, {})


@pytest.fixture
def store() -> Iterator[Any]:
    """Return the store that rank 0 serves."""
    yield TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))


def on_node(node: int, store: Any, count: int = 2, local: int = 1) -> Any:
    """Return the configuration of an engine on this node."""
    parallel = SimpleNamespace(
        nnodes_within_dp=count, node_rank_within_dp=node, local_world_size=local, world_size=count * local,
        master_addr="127.0.0.1", master_port=store.port if store else 1,
    )  # fmt: skip
    return SimpleNamespace(parallel_config=parallel)


def test_each_node_has_its_ranks() -> None:
    assert [nodes.local_ranks(on_node(node, None, count=3, local=2)) for node in range(3)] == [
        range(2), range(2, 4), range(4, 6),
    ]  # fmt: skip


def test_an_engine_on_one_node_makes_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCACHED_RUNTIME_DIR", str(tmp_path / "run"))

    def refuse(*arguments: Any, **options: Any) -> None:
        pytest.fail("a store was asked for")

    monkeypatch.setattr(torch.distributed, "TCPStore", refuse)
    chosen = vllm_config(tmp_path)
    nodes.require_same_cache(chosen, SETTINGS, 0)
    assert nodes.start_links(chosen, lambda: 0.0) == []
    assert nodes.start_agent(chosen, SETTINGS, "x", 0) is None
    assert nodes.local_ranks(chosen) == range(1)
    with running(chosen) as engine:
        assert engine.memory._links == []
        assert not [thread for thread in threading.enumerate() if thread.name == "kvcached-link"]


def test_values_and_rings_go_through_the_store_and_nothing_is_left_at_the_end(
    store: Any, tmp_path: Path
) -> None:
    runtimes = [Runtime.open(tmp_path / name) for name in ("home", "far")]
    accounts = [attach(runtimes[rank // 2], f"on-{rank // 2}", rank) for rank in range(4)]
    here, there = on_node(0, store, local=2), on_node(1, store, local=2)
    settings = config.load({"runtime_dir": str(runtimes[1].path)}, {})
    ends = [nodes.start_agent(here, settings, "on-0", rank) for rank in (0, 1)]
    ends += [nodes.start_agent(there, settings, "on-1", rank) for rank in (2, 3)]
    assert [isinstance(end, NodeAgent) for end in ends] == [False, False, True, False], (
        "one for each other node"
    )
    (home,) = nodes.start_links(here, time.monotonic)
    scheduler_view = SchedulerView.find(runtimes[0], "on-0", 4, remote_slots=home.slots)
    try:
        for account in accounts:
            account.drain()
        scheduler_view.publish(engine_usage(wanted_granules=2))
        for account in accounts:
            assert readable(account.fileno(), seconds=BOUND_SECONDS) == 1
            hold(account, 2)
        give_up_at = time.monotonic() + BOUND_SECONDS
        while scheduler_view.created() < 2:
            assert time.monotonic() < give_up_at
            assert readable(*(home.slots[rank].bell_fd for rank in (2, 3)), seconds=BOUND_SECONDS)
    finally:
        home.close()
        scheduler_view.close()
        for end in filter(None, ends):
            end.close()
        while ATTACHED:
            die(ATTACHED.pop())
    assert not [thread for thread in threading.enumerate() if thread.name == "kvcached-link"]


def test_a_transport_waits_again_when_the_store_times_out(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "_FOR_EVER", timedelta(seconds=0.05))
    here, there = (nodes.StoreTransport(on_node(0, store), *way) for way in (("a", "b"), ("b", "a")))
    heard: list[bytes] = []
    thread = threading.Thread(target=lambda: heard.append(here.receive()))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    there.send(b"hello")
    thread.join(BOUND_SECONDS)
    assert heard == [b"hello"]
    with pytest.raises(LedgerError, match=r"the store of the ranks at 127\.0\.0\.1:\d+: wait timeout"):
        here.receive(seconds=0.05)
    here.interrupt()
    assert here.receive() == b""


def test_a_store_that_has_gone_with_rank_0_is_a_ledger_error() -> None:
    rank_0 = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    post = nodes.StoreTransport(on_node(1, rank_0[0]), "a", "b")
    errors: list[LedgerError] = []

    def receive() -> None:
        try:
            post.receive()
        except LedgerError as error:
            errors.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    rank_0.clear()
    thread.join(BOUND_SECONDS)
    assert [str(error).partition(":")[0] for error in errors] == ["the store of the ranks at 127.0.0.1"]


def test_nodes_with_the_same_cache_find_each_other(store: Any) -> None:
    others = [
        threading.Thread(target=nodes.require_same_cache, args=(on_node(node, store), SETTINGS, node))
        for node in (0, 1)
    ]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join(BOUND_SECONDS)
        assert not thread.is_alive()


def test_a_node_without_the_plugin_is_named_with_the_remedy(store: Any) -> None:
    with pytest.raises(
        UnsupportedError, match=r"node 1 has not said within 0\.05 s that .*--kv-cache-backend"
    ):
        nodes.require_same_cache(on_node(0, store), SETTINGS, 0, seconds=0.05)


@pytest.mark.parametrize(
    ("what", "theirs"), [("kvcached-core", "0.0.9"), ("page_size", "3MiB"), ("layout", "engine")]
)
def test_a_node_with_another_setting_is_named_with_both_values(store: Any, what: str, theirs: str) -> None:
    there = on_node(1, store)
    here = on_node(0, store)
    if what == "kvcached-core":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kvcached_core, "__version__", theirs)
            with pytest.raises(UnsupportedError):
                nodes.require_same_cache(
                    there, SETTINGS, 1, seconds=0.05
                )  # announces its own cache, and finds no other node
    else:
        with pytest.raises(UnsupportedError):
            nodes.require_same_cache(there, config.load({what: theirs}, {}), 1, seconds=0.05)
    shown = "3 MiB" if theirs == "3MiB" else re.escape(theirs)
    with pytest.raises(UnsupportedError, match=rf"node 1 has {what} {shown}, and here it is .*the same"):
        nodes.require_same_cache(here, SETTINGS, 0)


def test_ranks_whose_granules_differ_are_refused_with_the_numbers() -> None:
    one = SlotGeometry(1 << 20, 1 << 20, 64, 4, 256, 1 << 18)
    scheduler_memory._require_one_geometry([one, one, one._replace(page_bytes=2 << 20, stride_bytes=1 << 19)])
    with pytest.raises(ConfigError, match="rank 0 has 64 granules of 4 blocks, rank 1 has 32 of 8: give all"):
        scheduler_memory._require_one_geometry([one, one._replace(granule_count=32, blocks_per_granule=8)])
    with pytest.raises(ConfigError, match="rank 1 has"):
        scheduler_memory._require_one_geometry([one, one._replace(page_bytes=(1 << 20) + 4096)])
