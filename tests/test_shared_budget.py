"""benchmarks.sharing.shared_budget: its trace of requests, and the load generator that plays it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

from benchmarks.lib.open_loop import Arrival, Served, failures, play
from benchmarks.sharing.shared_budget import BUDGET_BYTES, BURSTS, NAMES, SHAPE, make_trace
from kvcached_core.units import KIB

BLOCK_TOKENS, BLOCK_BYTES = 128, 512 * KIB  # of the tiny model on the CPU


WAITS, SHORT = 1, 2  # first token: the answer waits for the next request; its last token is missing
SEPARATORS = "a\x85b\u2028c"  # str.splitlines() splits here, an event stream does not


class _Server:
    """Answers with as many tokens as asked for, except to prompts that begin with WAITS or SHORT."""

    def __init__(self) -> None:
        self._second_came = asyncio.Event()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        body = json.loads(await reader.readexactly(int(head.partition("content-length:")[2].split()[0])))
        first = body["prompt"][0]
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n")
        for part in ([], [1], list(range(body["max_tokens"] - 1 - (first == SHORT)))):
            event = {"choices": [{"token_ids": part, "text": SEPARATORS}]}
            writer.write(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n")
            await writer.drain()
            if part == [1] and first == WAITS:
                await self._second_came.wait()
        if first != WAITS:
            self._second_came.set()
        writer.write(b"data: [DONE]\n\n")
        writer.close()


async def _play(arrivals: list[Arrival]) -> list[Served]:
    server = await asyncio.start_server(_Server().answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return await asyncio.wait_for(play({"a": f"http://127.0.0.1:{port}"}, "m", arrivals), 30)


def test_requests_leave_when_due_also_while_others_are_unanswered() -> None:
    arrivals = [Arrival(0.0, "a", "alone", (WAITS,), 5), Arrival(0.1, "a", "alone", (3,), 5)]
    first, second = asyncio.run(_play(arrivals))
    assert not failures([first, second])
    assert 0 < first.ttft_seconds < first.end_seconds
    assert first.end_seconds >= 0.1, "it ended after the second had come"
    assert 0 < second.ttft_seconds <= second.end_seconds


def test_an_incomplete_answer_and_a_server_that_is_gone_are_failures() -> None:
    (short,) = asyncio.run(_play([Arrival(0.0, "a", "alone", (SHORT,), 5)]))
    assert failures([short]) == ["alone: ValueError: 4 tokens came of 5"]
    (gone,) = asyncio.run(play({"a": "http://127.0.0.1:1"}, "m", [Arrival(0.0, "a", "alone", (1,), 5)]))
    assert "ConnectError" in gone.error


def test_a_burst_needs_more_than_half_of_the_budget_and_less_than_all() -> None:
    blocks = -(-(SHAPE.prompt_tokens + SHAPE.max_tokens) // BLOCK_TOKENS)
    assert BUDGET_BYTES / 2 < SHAPE.requests * blocks * BLOCK_BYTES < BUDGET_BYTES


def test_the_trace_is_the_same_for_the_same_seed_and_shares_no_prefix() -> None:
    trace = make_trace(1)
    assert trace == make_trace(1) != make_trace(2)
    counts = Counter((arrival.engine, arrival.burst) for arrival in trace)
    alone = BURSTS // len(NAMES) * SHAPE.requests
    assert counts == {
        (n, kind): c for n in NAMES for kind, c in (("alone", alone), ("together", SHAPE.requests))
    }
    assert len({arrival.prompt[:BLOCK_TOKENS] for arrival in trace}) == len(trace)
