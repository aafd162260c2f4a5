"""Send requests to SGLang's own HTTP interface; prompts and answers are those of devkit.client."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from devkit.client import Answers, Client, Prompt


class SglangClient(Client):
    """Talks to one server. Many threads may use it: each gets its own connection."""

    path = "/generate"

    def __init__(self, url: str) -> None:
        super().__init__(url, connections=None)

    @staticmethod
    def body(prompt: Prompt) -> dict[str, Any]:
        """Return the body of a request for a prompt."""
        sampling = {"temperature": 0, "max_new_tokens": prompt.max_tokens, "ignore_eos": True}
        return {"input_ids": list(prompt.tokens), "sampling_params": sampling}

    @staticmethod
    def ids_of(answer: dict[str, Any]) -> tuple[int, ...]:
        """Return the token ids in an answer."""
        return tuple(answer["output_ids"])

    def all_at_once(self, prompts: Sequence[Prompt], at_once: int) -> Answers:
        """Return the answer to each prompt, with `at_once` requests at a time."""
        with ThreadPoolExecutor(at_once) as pool:
            return dict(zip(prompts, pool.map(self.ids, prompts), strict=True))

    def reset_prefix_cache(self) -> bool:
        """Drop the prefix cache; return False if the server refused because requests run."""
        return self._http.post("/flush_cache").status_code == httpx.codes.OK

    def state(self) -> dict[str, Any]:
        """Return the internal state of the first scheduler."""
        answer = self._http.get("/server_info").raise_for_status().json()
        return dict(answer["internal_states"][0])
