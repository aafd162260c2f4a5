"""Streamed answers of an OpenAI-compatible server, one JSON event at a time."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
from httpx_sse import aconnect_sse


async def stream(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Post a request and yield each event of its answer as it arrives.

    Raises httpx.HTTPError, or ValueError if the server answers with an error status or sends an error event.
    """
    async with aconnect_sse(client, "POST", path, json=body) as source:
        response = source.response
        if response.is_error:
            text = (await response.aread()).decode(errors="replace")
            raise ValueError(f"status {response.status_code}: {text[:200]}")
        async for sent in source.aiter_sse():
            if sent.data == "[DONE]":
                continue
            event: dict[str, Any] = json.loads(sent.data)
            if "error" in event:
                raise ValueError(f"the server says: {event['error']}")
            yield event
