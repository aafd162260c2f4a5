"""Something that answers like a server and holds memory in a real ledger like one, in no time at all.

`python -m tests.fake_engine PORT`: each request holds granules while it runs and leaves some of them cached.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

from kvcached_core.driver.base import DeviceIdentity, MemoryInfo
from kvcached_core.ledger import Account, Desk, Runtime
from kvcached_core.units import GIB, MIB

GRANULE = MIB
HELD_BY_REQUEST, LEFT_BY_REQUEST, SPARE = 10, 8, 16  # granules
TURN_SECONDS, TOKEN_SECONDS, TOKENS = 0.01, 0.06, 5


class FakeEngine:
    """The state of the engine in granules: 1 <= held <= limit, and used + cached <= held."""

    def __init__(self) -> None:
        runtime = Runtime.open()
        name = os.environ["KVCACHED_NAME"]
        self.account = Account.attach(
            runtime, DeviceIdentity("host", "host"), 4 * GIB, 0, instance="fake", rank=0, name=name,
            limit_bytes=512 * MIB,
        )  # fmt: skip
        self.account.describe(
            page_bytes=GRANULE, granule_bytes=GRANULE, granule_count=512, blocks_per_granule=1,
            block_count=512, stride_bytes=GRANULE,
        )  # fmt: skip
        self.running = self.cached = self.held = self.released = 0
        self.turn()
        self.desk = Desk.find(runtime, "fake", 1)

    def turn(self) -> None:
        """Hold what requests and cache need, within the limit, and say so."""
        self.account.acknowledge()
        limit = self.account.limit_bytes // GRANULE
        used = min(limit, self.running * HELD_BY_REQUEST)
        self.cached = min(self.cached, limit - used)
        wanted = max(1, min(limit, used + self.cached + (SPARE if self.running else 0)))
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

    def publish(self) -> None:
        used = min(self.held, self.running * HELD_BY_REQUEST)
        self.desk.publish(
            SimpleNamespace(
                used_blocks=used, cached_blocks=min(self.cached, self.held - used), stranded_blocks=0,
                wanted_granules=self.held, released_granules=self.released,
            )
        )  # fmt: skip

    async def run(self) -> None:
        """Take turns until cancelled."""
        while True:
            self.turn()
            self.publish()
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
