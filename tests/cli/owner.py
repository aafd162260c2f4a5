"""An engine without a model, in its own process, with real host memory, account, scheduler view and governor.

`python -m tests.cli.owner NAME DEVICE` prints `ready`, then carries out lines on stdin and answers each with
a line: `serve USED CACHED` in blocks, `private BYTES`, and `memfd` for the bytes that the kernel counts.
Between two lines it sleeps in poll(), like an idle engine.
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
        self.view = SchedulerView.find(runtime, f"{name}-{os.getpid()}", 1)
        self.granules = Granules([Block(n) for n in range(SIZE * COUNT)], range(0, SIZE * COUNT, SIZE), SIZE)
        self.governor = Governor(self.granules, self.view, self._evict, spare_granules=2, idle_seconds=1e9)
        self.used: list[Block] = []
        self.cached: list[Block] = []
        self.evictions = 0
        self._handles: list[Handle] = []
        self._private_bytes = 0
        self.settle()

    def _evict(self, blocks: list[Block]) -> None:
        self.evictions += len(blocks)
        for block in blocks:
            self.cached.remove(block)

    def serve(self, used: int, cached: int) -> None:
        """Take blocks for requests; `cached` of them end and stay in the prefix cache."""
        self.settle(demand=used + cached)
        taken = self.granules.take(used + cached)
        assert len(taken) == used + cached, "not granted"
        self.granules.lend(taken[:cached])
        self.cached += taken[:cached]
        self.used += taken[cached:]
        self.settle()

    def settle(self, demand: int = 0) -> None:
        """Do the work of worker and scheduler between two steps."""
        self.account.acknowledge()
        busy = bool(self.used or demand)
        self.governor.update(time.monotonic(), demand, busy)
        self._create_granted()
        if busy:
            self.governor.update(time.monotonic(), demand, busy)
        self.governor.take_plan()
        self._release()
        idle_since_ms = 0 if busy else int(time.monotonic() * 1000)
        self.view.count(self.evictions, 0, busy, idle_since_ms)
        self.account.publish(len(self._handles) * PAGE, self._private_bytes)

    def _create_granted(self) -> None:
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
        """Return the bytes that the kernel counts for this process's pages."""
        return os.fstat(self.driver._fd).st_blocks * 512

    def carry_out(self, line: str) -> str:
        """Carry out one line."""
        word, *numbers = line.split()
        if word == "serve":
            self.serve(int(numbers[0]), int(numbers[1]))
        elif word == "private":
            self._private_bytes = int(numbers[0])
            self.settle()
        else:
            assert word == "memfd"
            return str(self.memory_bytes())
        return "done"

    def run(self) -> None:
        """Sleep until a doorbell rings or a line arrives; return at the end of stdin."""
        poller = select.poll()
        for descriptor in (0, self.account.fileno(), *self.view.filenos()):
            poller.register(descriptor, select.POLLIN | select.POLLHUP)
        print("ready", flush=True)
        while True:
            rung = [descriptor for descriptor, _ in poller.poll()]
            self.account.drain()
            self.view.drain()
            self.settle()
            if 0 in rung:
                line = sys.stdin.readline()
                if not line:
                    return
                print(self.carry_out(line), flush=True)


if __name__ == "__main__":
    Owner(Runtime.open(), sys.argv[1], sys.argv[2]).run()
