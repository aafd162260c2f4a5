"""Ranks of one engine wait for their devices in one order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from kvcached_core.errors import ConfigError, KVCachedError
from kvcached_core.startup.rank_start import in_device_order


class Ranks:
    """Threads that exchange values as the ranks of an engine do."""

    def __init__(self, devices: list[str]) -> None:
        self._devices = devices
        self._barrier = threading.Barrier(len(devices))
        self._said: list[Any] = [None] * len(devices)
        self.ended: list[str] = []
        self.errors: list[str] = [""] * len(devices)

    def run(self, wait: Callable[[int], None]) -> None:
        threads = [threading.Thread(target=self._rank, args=(n, wait)) for n in range(len(self._devices))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()

    def _rank(self, rank: int, wait: Callable[[int], None]) -> None:
        def gather(mine: Any) -> list[Any]:
            self._barrier.wait(20)
            self._said[rank] = mine
            self._barrier.wait(20)
            return list(self._said)

        def wait_and_note() -> None:
            wait(rank)
            self.ended.append(self._devices[rank])

        try:
            in_device_order(self._devices[rank], wait_and_note, gather)
        except KVCachedError as error:
            self.errors[rank] = f"{type(error).__name__}: {error}"


def test_ranks_wait_for_their_devices_one_after_the_other_in_one_order() -> None:
    ranks = Ranks(["GPU-c", "GPU-a", "GPU-b", "GPU-a"])
    ranks.run(lambda rank: None)
    assert ranks.ended == ["GPU-a", "GPU-a", "GPU-b", "GPU-c"] and ranks.errors == [""] * 4


def test_what_refuses_one_rank_refuses_all_and_nobody_waits_further() -> None:
    ranks = Ranks(["GPU-c", "GPU-a", "GPU-b"])

    def wait(rank: int) -> None:
        if rank == 2:
            raise ConfigError("no room on GPU-b")

    ranks.run(wait)
    assert ranks.ended == ["GPU-a"]
    assert ranks.errors == [
        "CapacityError: no room on GPU-b", "CapacityError: no room on GPU-b", "ConfigError: no room on GPU-b",
    ]  # fmt: skip
