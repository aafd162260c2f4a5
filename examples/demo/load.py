"""Chat requests over the OpenAI API, in bursts with shared system prompts."""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple

import httpx

from devkit.streams import stream

ROLES = ("teacher", "cook", "gardener", "historian")
_RULES = (
    "Answer in plain words and in whole sentences. Give an example whenever it helps. "
    "Do not repeat the question. If you do not know something, say so. Keep the order of events. "
    "Name places and people in full. "
)
_TOPICS = ("the sea", "bread", "trees", "Paris", "winter", "bridges", "music", "the moon", "rice", "horses")


class Request(NamedTuple):
    """One chat request: a system prompt that other requests share, and its own question."""

    system: str
    question: str
    max_tokens: int


class Outcome(NamedTuple):
    """The outcome of a request. Times in seconds; `error` is empty on success."""

    engine: str
    tokens: int
    ttft_seconds: float  # time to first token
    tpot_seconds: float  # time per output token after the first
    error: str = ""


def questions(count: int, seed: int, max_tokens: int) -> list[Request]:
    """Return requests that share four system prompts of about 500 tokens; everything else in them differs."""
    made = []
    for i in range(count):
        role, topic = ROLES[i % len(ROLES)], _TOPICS[(seed + i) % len(_TOPICS)]
        system = f"You are a patient {role}. {_RULES * 10}"
        made.append(Request(system, f"Question {seed}.{i}: tell me a short story about {topic}.", max_tokens))
    return made


async def burst(
    client: httpx.AsyncClient, engine: str, requests: list[Request], at_once: int
) -> list[Outcome]:
    """Send requests to an engine, `at_once` of them at a time, and return their outcomes."""
    gate = asyncio.Semaphore(at_once)

    async def one(request: Request) -> Outcome:
        async with gate:
            try:
                return await chat(client, engine, request)
            except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
                return Outcome(engine, 0, 0.0, 0.0, f"{type(error).__name__}: {error}")

    return list(await asyncio.gather(*map(one, requests)))


async def chat(client: httpx.AsyncClient, engine: str, request: Request) -> Outcome:
    """Stream one answer and time its tokens; raises httpx.HTTPError or ValueError."""
    body = {
        "model": engine,
        "messages": [
            {"role": "system", "content": request.system},
            {"role": "user", "content": request.question},
        ],
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begun = time.perf_counter()
    arrivals: list[float] = []
    tokens = 0
    async for event in stream(client, "/v1/chat/completions", body):
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
        if event["choices"] and event["choices"][0]["delta"].get("content"):
            arrivals.append(time.perf_counter())
    if not arrivals or not tokens:
        raise ValueError("the answer is empty")
    tpot = (arrivals[-1] - arrivals[0]) / (tokens - 1) if tokens > 1 else 0.0
    return Outcome(engine, tokens, arrivals[0] - begun, tpot)
