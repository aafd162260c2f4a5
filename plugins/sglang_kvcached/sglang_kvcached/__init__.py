"""Elastic KV cache for stock SGLang."""

from __future__ import annotations

__version__ = "0.1.0"


def register() -> None:
    """SGLang's entry point."""
