"""A fake vLLM server: it holds memory in a real ledger, but has no model and starts at once.

`python -m tests.fake_engine PORT`: each request holds granules while it runs and leaves some of them cached.
KVCACHED_NAME gives the engine's name, KVCACHED_HOST_CAPACITY the capacity of the device.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

from kvcached_core.driver.base import DeviceIdentity, MemoryInfo
from kvcached_core.ledger import Account, EngineUsage, Runtime, SchedulerView
from kvcached_core.units import GIB, MIB, parse_size

GRANULE = MIB
HELD_BY_REQUEST, LEFT_BY_REQUEST, SPARE = 6, 4, 16  # granules
TURN_SECONDS, KEEP_SECONDS, TOKEN_SECONDS, TOKENS = 0.01, 0.05, 0.06, 5


class FakeEngine:
    """The engine's state. In granules: 1 <= held <= limit, and used + cached <= held."""

    def __init__(self) -> None:
        runtime = Runtime.open()
        name = os.environ["KVCACHED_NAME"]
        capacity = parse_size(os.environ["KVCACHED_HOST_CAPACITY"]).of(0)
        self.account = Account.attach(
            runtime, DeviceIdentity("host", "host"), capacity, 0, instance=name, rank=0, name=name,
            limit_bytes=capacity, keep_seconds=KEEP_SECONDS,
        )  # fmt: skip
        count = capacity // GRANULE
        self.account.describe(
            page_bytes=GRANULE, granule_bytes=GRANULE, granule_count=count, blocks_per_granule=1,
            block_count=count, stride_bytes=GRANULE,
        )  # fmt: skip
        self.running = self.cached = self.held = self.released = self._idle_since_ms = 0
        self.view = SchedulerView.find(runtime, name, 1)
        self.turn()

    def turn(self) -> None:
        """Lease or give back granules to match requests and cache, within the limit; then publish."""
        self.account.acknowledge()
        most = self.account.limit_bytes // GRANULE
        used = min(most, max(1, self.running * HELD_BY_REQUEST))
        if target := self.view.target_granules():
            most = max(used, min(most, target))  # never below the memory of running requests
        self._most = most
        self.cached = min(self.cached, most - used)
        wanted = min(most, used + self.cached + (SPARE if self.running else 0))
        self.publish(used, wanted)
        if wanted > self.held:
            granted = (
                self.account.lease((wanted - self.held) * GRANULE, MemoryInfo(8 * GIB, 8 * GIB)) // GRANULE
            )
            self.account.created(granted)
            self.held += granted
        elif wanted < self.held:
            self.account.give_back(granules_released=self.held - wanted)
            self.released += self.held - wanted
            self.held = wanted
        self.account.check()
        self.publish(used, wanted)

    def publish(self, used: int, wanted: int) -> None:
        """Write the ledger fields that a scheduler writes."""
        used_now = min(self.held, used)
        self.view.publish(
            EngineUsage(
                used_blocks=used_now, cached_blocks=min(self.cached, self.held - used_now), stranded_blocks=0,
                wanted_granules=wanted, enough_granules=wanted, needed_granules=used,
                released_granules=self.released, mapped_granules=self.held,
            )
        )  # fmt: skip
        busy = self.running > 0
        self._idle_since_ms = 0 if busy else self._idle_since_ms or time.monotonic_ns() // 1_000_000
        self.view.count(0, 0, busy, self._idle_since_ms)

    async def run(self) -> None:
        """Call turn() again and again until cancelled."""
        while True:
            self.turn()
            await asyncio.sleep(TURN_SECONDS)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection with one request."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n")
        if head.startswith("post"):
            length = int(head.partition("content-length:")[2].split()[0])
            json.loads(await reader.readexactly(length))
            await self._generate(writer)
        await writer.drain()
        writer.close()

    async def _generate(self, writer: asyncio.StreamWriter) -> None:
        while self.running and (self.running + 1) * HELD_BY_REQUEST > self._most:
            await asyncio.sleep(TURN_SECONDS)
        self.running += 1
        for _ in range(TOKENS):
            await asyncio.sleep(TOKEN_SECONDS)
            _send(writer, {"choices": [{"delta": {"content": "word "}}]})
        _send(writer, {"choices": [], "usage": {"completion_tokens": TOKENS}})
        writer.write(b"data: [DONE]\n\n")
        self.running -= 1
        self.cached += LEFT_BY_REQUEST


def _send(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    writer.write(b"data: " + json.dumps(event).encode() + b"\n\n")


async def _main(port: int) -> None:
    engine = FakeEngine()
    server = await asyncio.start_server(engine.answer, "127.0.0.1", port)
    async with server:
        await engine.run()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1])))
