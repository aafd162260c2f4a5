"""Send requests to a vLLM server over HTTP, and read the token ids of its answers."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx

from devkit.servers import MODEL_NAME

SEQUENTIAL, CONCURRENCY = 12, 16
_FIRST_TOKEN, _LAST_TOKEN = 3, 499
_PREFIX_TOKENS = 256


class Prompt(NamedTuple):
    """Token ids of a prompt, and the number of tokens to generate, greedily and ignoring end of sequence."""

    tokens: tuple[int, ...]
    max_tokens: int


Answers = dict[Prompt, tuple[int, ...]]


def _tokens(source: random.Random, count: int) -> tuple[int, ...]:
    return tuple(source.randint(_FIRST_TOKEN, _LAST_TOKEN) for _ in range(count))


def many_prompts(count: int = 200, seed: int = 5) -> list[Prompt]:
    """Return prompts of 5 to 755 tokens that ask for 4 to 31; every third begins with the same prefix."""
    source = random.Random(seed)
    prefix = _tokens(source, _PREFIX_TOKENS)
    prompts = []
    for number in range(count):
        own = _tokens(source, source.randint(5, 499))
        prompts.append(Prompt(prefix + own if number % 3 == 0 else own, source.randint(4, 31)))
    return prompts


def long_prompts(count: int, tokens: int, max_tokens: int) -> list[Prompt]:
    """Return prompts of one length that have nothing in common."""
    source = random.Random(tokens * 1000 + max_tokens)
    return [Prompt(_tokens(source, tokens), max_tokens) for _ in range(count)]


class Client:
    """Talks to one server; may be used by many threads."""

    path = "/v1/completions"

    def __init__(self, url: str, connections: int | None = 64) -> None:
        # No connection is kept alive: one thread could close it just after another thread got it.
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=0)
        self._http = httpx.Client(base_url=url, timeout=180.0, limits=limits)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self._http.close()

    @staticmethod
    def body(prompt: Prompt) -> dict[str, Any]:
        """Return the body of a request for a prompt."""
        return {
            "model": MODEL_NAME,
            "prompt": list(prompt.tokens),
            "max_tokens": prompt.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }

    @staticmethod
    def ids_of(answer: dict[str, Any]) -> tuple[int, ...]:
        """Return the token ids in an answer."""
        return tuple(answer["choices"][0]["token_ids"])

    def complete(self, prompt: Prompt) -> httpx.Response:
        """Send one request and return the response, even if its status is an error."""
        return self._http.post(self.path, json=self.body(prompt))

    def ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the generated token ids; raises httpx.HTTPStatusError."""
        return self.ids_of(self.complete(prompt).raise_for_status().json())

    def abort(self, prompt: Prompt, after_chunks: int) -> bool:
        """Close the connection after `after_chunks` chunks; return whether the request was still running."""
        with self._http.stream("POST", self.path, json=self.body(prompt) | {"stream": True}) as answer:
            answer.raise_for_status()
            seen = 0
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    return False
                seen += line.startswith("data: ")
                if seen >= after_chunks:
                    return True
        return False

    def answers(self, prompts: Sequence[Prompt], sequential: int = 0) -> Answers:
        """Return the answer to each prompt: the first `sequential` one by one, the others 16 at a time."""
        found = {prompt: self.ids(prompt) for prompt in prompts[:sequential]}
        rest = prompts[sequential:]
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            return found | dict(zip(rest, pool.map(self.ids, rest), strict=True))

    def chat(self, text: str, max_tokens: int) -> str:
        """Return a chat model's answer to one message."""
        body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": text}], "temperature": 0,
                "max_tokens": max_tokens}  # fmt: skip
        answer = self._http.post("/v1/chat/completions", json=body).raise_for_status().json()
        return str(answer["choices"][0]["message"]["content"])

    def rpc(self, method: str) -> list[Any]:
        """Call a method on every worker; raises httpx.HTTPStatusError if the method raised an error there."""
        answer = self._http.post("/collective_rpc", json={"method": method}).raise_for_status()
        return list(answer.json()["results"])

    def reset_prefix_cache(self) -> bool:
        """Drop the prefix cache; return False if the server refused because requests run."""
        return bool(self._http.post("/reset_prefix_cache").raise_for_status().json()["success"])

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Put the engine to sleep."""
        self._http.post("/sleep", params={"level": level, "mode": mode}).raise_for_status()

    def wake_up(self, *tags: str) -> httpx.Response:
        """Wake the parts with these tags, or all; return the response, even if its status is an error."""
        return self._http.post("/wake_up", params={"tags": list(tags)})

    def release_kv_cache_memory(self) -> None:
        """Give up the KV cache of a paused engine."""
        self._http.post("/release_kv_cache_memory").raise_for_status()

    def is_sleeping(self) -> bool:
        """Return whether the engine sleeps."""
        return bool(self._http.get("/is_sleeping").raise_for_status().json()["is_sleeping"])

    def metric(self, name: str) -> float:
        """Return a metric's value, summed over its labels."""
        text = self._http.get("/metrics").raise_for_status().text
        values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert values, f"the server has no metric {name}"
        return sum(map(float, values))


def differences(ours: Answers, theirs: Answers) -> list[str]:
    """Return a sentence for each prompt whose answers in `ours` and `theirs` differ."""
    wrong = []
    for prompt, ids in ours.items():
        if ids != theirs[prompt]:
            pairs = zip(ids, theirs[prompt], strict=True)
            first = next(at for at, (one, other) in enumerate(pairs) if one != other)
            wrong.append(
                f"a prompt of {len(prompt.tokens)} tokens differs from token {first} of {len(ids)} on"
            )
    return wrong
