"""An engine without a model: real host memory, a real account, desk and governor, in a process of its own.

`python -m tests.cli.owner NAME DEVICE`: says `ready`, then obeys lines on stdin (`serve USED CACHED` in
blocks, `private BYTES`, `memfd` for the bytes that the kernel counts) and answers each with a line.
Between them it sleeps in poll() like an engine that is idle.
"""

from __future__ import annotations

import os
import select
import sys
import time

from kvcached_core.driver.base import DeviceIdentity, Handle
from kvcached_core.driver.host import HostDriver
from kvcached_core.ledger import Account, Runtime, SchedulerView
from kvcached_core.scheduler.governor import Governor
from kvcached_core.scheduler.granules import Granules
from tests.core.test_granules import Block

PAGE, COUNT, SIZE = 1 << 20, 64, 4  # bytes of a granule, granules, blocks of a granule
CAPACITY = PAGE * COUNT


class Owner:
    """One rank: worker and scheduler in one thread."""

    def __init__(self, runtime: Runtime, name: str, device: str = "host") -> None:
        self.driver = HostDriver(CAPACITY)
        self.account = Account.attach(
            runtime, DeviceIdentity(device, "test"), CAPACITY, 0, instance=f"{name}-{os.getpid()}", rank=0,
            name=name, engine="vllm 0.32.0", model="tiny",
        )  # fmt: skip
        self.account.describe(
            page_bytes=PAGE, granule_bytes=PAGE, granule_count=COUNT, blocks_per_granule=SIZE,
            block_count=SIZE * COUNT, stride_bytes=PAGE // SIZE,
        )  # fmt: skip
        self.desk = SchedulerView.find(runtime, f"{name}-{os.getpid()}", 1)
        self.granules = Granules([Block(n) for n in range(SIZE * COUNT)], range(0, SIZE * COUNT, SIZE), SIZE)
        self.governor = Governor(self.granules, self.desk, self._evict, spare_granules=2, idle_seconds=1e9)
        self.used: list[Block] = []
        self.cached: list[Block] = []
        self.evictions = 0
        self._handles: list[Handle] = []
        self._private_bytes = 0
        self.turn()

    def _evict(self, blocks: list[Block]) -> None:
        self.evictions += len(blocks)
        for block in blocks:
            self.cached.remove(block)

    def serve(self, used: int, cached: int) -> None:
        """Take blocks for requests; `cached` of them end and stay in the prefix cache."""
        self.turn(demand=used + cached)
        taken = self.granules.take(used + cached)
        assert len(taken) == used + cached, "not granted"
        self.granules.lend(taken[:cached])
        self.cached += taken[:cached]
        self.used += taken[cached:]
        self.turn()

    def turn(self, demand: int = 0) -> None:
        """Do what worker and scheduler do between two steps."""
        self.account.acknowledge()
        busy = bool(self.used or demand)
        self.governor.update(time.monotonic(), demand, busy)
        self._supply()
        if busy:
            self.governor.update(time.monotonic(), demand, busy)
        self.governor.take_plan()
        self._release()
        idle_since_ms = 0 if busy else int(time.monotonic() * 1000)
        self.desk.count(self.evictions, 0, busy, idle_since_ms)
        self.account.publish(len(self._handles) * PAGE, self._private_bytes)

    def _supply(self) -> None:
        want = self.account.wanted_bytes - self.account.leased_bytes
        granted = self.account.lease(want, self.driver.memory()) // PAGE if want > 0 else 0
        for _ in range(granted):
            self._handles.append(self.driver.create(PAGE))
            self.account.created(1)

    def _release(self) -> None:
        over = len(self._handles) - self.governor.held
        if over > 0:
            self.account.publish(self.governor.held * PAGE, self._private_bytes)
            for _ in range(over):
                self.driver.release(self._handles.pop())
            self.account.give_back(granules_released=over)

    def memory_bytes(self) -> int:
        """Return what the kernel counts for this process's pages."""
        return os.fstat(self.driver._fd).st_blocks * 512

    def obey(self, line: str) -> str:
        """Carry out one line."""
        word, *numbers = line.split()
        if word == "serve":
            self.serve(int(numbers[0]), int(numbers[1]))
        elif word == "private":
            self._private_bytes = int(numbers[0])
            self.turn()
        else:
            assert word == "memfd"
            return str(self.memory_bytes())
        return "done"

    def run(self) -> None:
        """Sleep until somebody rings or speaks; ends with stdin."""
        poller = select.poll()
        for descriptor in (0, self.account.fileno(), *self.desk.filenos()):
            poller.register(descriptor, select.POLLIN | select.POLLHUP)
        print("ready", flush=True)
        while True:
            rung = [descriptor for descriptor, _ in poller.poll()]
            self.account.drain()
            self.desk.drain()
            self.turn()
            if 0 in rung:
                line = sys.stdin.readline()
                if not line:
                    return
                print(self.obey(line), flush=True)


if __name__ == "__main__":
    Owner(Runtime.open(), sys.argv[1], sys.argv[2]).run()
