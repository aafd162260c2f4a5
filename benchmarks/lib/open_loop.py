"""Send an open-loop load: each request is sent at its own time, even while earlier ones are unanswered."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import httpx

from devkit.streams import stream

_FIRST_TOKEN, _LAST_TOKEN = 3, 499  # of the tiny model's vocabulary
TIMEOUT_SECONDS = 300.0


class Arrival(NamedTuple):
    """One request: its time, engine, burst, prompt and number of tokens."""

    at_seconds: float
    engine: str
    burst: str
    prompt: tuple[int, ...]
    max_tokens: int


class Served(NamedTuple):
    """The outcome of a request. Times are seconds since it was due; `error` is empty on success."""

    engine: str
    burst: str
    ttft_seconds: float  # time to the first token
    end_seconds: float  # time to the last token
    error: str = ""


class Shape(NamedTuple):
    """A burst: a number of requests at random moments within some seconds, and the tokens of each."""

    requests: int
    seconds: float
    prompt_tokens: int
    max_tokens: int


def burst(engine: str, name: str, begin_seconds: float, shape: Shape, source: random.Random) -> list[Arrival]:
    """Return requests at uniformly random moments; no two prompts share a prefix."""
    moments = sorted(source.uniform(0.0, shape.seconds) for _ in range(shape.requests))
    return [
        Arrival(
            begin_seconds + moment,
            engine,
            name,
            tuple(source.randint(_FIRST_TOKEN, _LAST_TOKEN) for _ in range(shape.prompt_tokens)),
            shape.max_tokens,
        )
        for moment in moments
    ]


async def play(urls: Mapping[str, str], model: str, arrivals: Sequence[Arrival]) -> list[Served]:
    """Send every request when it is due; return the outcomes in the order of `arrivals`."""
    limits = httpx.Limits(max_connections=None)
    clients = {
        name: httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS, limits=limits)
        for name, url in urls.items()
    }
    begun = time.perf_counter()

    async def one(arrival: Arrival) -> Served:
        due = begun + arrival.at_seconds
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        try:
            return await _ask(clients[arrival.engine], model, arrival, due)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            late = time.perf_counter() - due
            return Served(arrival.engine, arrival.burst, late, late, f"{type(error).__name__}: {error}")

    try:
        return list(await asyncio.gather(*map(one, arrivals)))
    finally:
        await asyncio.gather(*(client.aclose() for client in clients.values()))


async def _ask(client: httpx.AsyncClient, model: str, arrival: Arrival, due: float) -> Served:
    """Stream one answer; raises httpx.HTTPError, or ValueError for an incomplete answer."""
    body = {
        "model": model,
        "prompt": list(arrival.prompt),
        "max_tokens": arrival.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }
    tokens, first = 0, 0.0
    async for event in stream(client, "/v1/completions", body):
        got = sum(len(choice.get("token_ids") or ()) for choice in event["choices"])
        if got and not tokens:
            first = time.perf_counter() - due
        tokens += got
    if tokens != arrival.max_tokens:
        raise ValueError(f"{tokens} tokens came of {arrival.max_tokens}")
    return Served(arrival.engine, arrival.burst, first, time.perf_counter() - due)


def failures(served: Iterable[Served]) -> list[str]:
    """Return a sentence for each request that failed."""
    return [f"{each.burst}: {each.error}" for each in served if each.error]
