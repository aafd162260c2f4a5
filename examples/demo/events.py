"""Server-sent events of an OpenAI-like server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

_PREFIX, _DONE = b"data: ", b"[DONE]"


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON of each event as it comes; raises httpx.HTTPError, or ValueError for an error event.

    Lines end with a line feed only: generated text may hold any other separator that Unicode knows.
    """
    if response.is_error:
        text = (await response.aread()).decode(errors="replace")
        raise ValueError(f"status {response.status_code}: {text[:200]}")
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(_PREFIX) or line.startswith(_PREFIX + _DONE):
                continue
            event: dict[str, Any] = json.loads(line.removeprefix(_PREFIX))
            if "error" in event:
                raise ValueError(f"the server says: {event['error']}")
            yield event
