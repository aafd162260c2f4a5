"""Elastic KV cache for stock SGLang, registered through its general plugins.

`sglang serve --model-path MODEL --kv-cache-backend kvcached`, or `ENABLE_KVCACHED=true` for any of SGLang's
commands, or in Python `with sglang_kvcached.elastic(): engine = sglang.Engine(...)`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang_kvcached.process_state import RUN_VARIABLE

__version__ = "0.1.0"


def register() -> None:
    """Register the plugin in a process of SGLang; adds only the flag unless the backend is chosen.

    Ends the process with one sentence if the chosen backend cannot be used: SGLang would log an exception and
    go on without the plugin.
    """
    from sglang_kvcached import hooks

    os.environ.setdefault(RUN_VARIABLE, secrets.token_hex(6))
    hooks.register()


@contextmanager
def elastic(**options: Any) -> Iterator[None]:
    """Make engines that start inside the block elastic; `options` are settings as in docs/sglang.md.

    The settings reach the engine's processes as environment variables, which are restored at the end. Raises
    ConfigError for an unknown or illegal setting, UnsupportedError if SGLang cannot be used.
    """
    from kvcached_core import config
    from sglang_kvcached import seams

    config.load(options, os.environ)
    seams.require()
    names = {option.name: option.variable for option in config.OPTIONS}
    chosen = {names[name]: str(value) for name, value in options.items()}
    chosen[config.SWITCH_VARIABLE] = "1"
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
