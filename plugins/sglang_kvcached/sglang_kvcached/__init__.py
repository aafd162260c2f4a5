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

__version__ = "0.1.0"

# Set in the first process of an engine and inherited by the others: part of the name by which they meet.
RUN_VARIABLE = "_KVCACHED_RUN"


def register() -> None:
    """SGLang's entry point: in every process of an engine; the flag alone unless the backend is chosen.

    Ends the process with one sentence if the backend is asked for and cannot be had: SGLang would log an
    exception and go on without the plugin.
    """
    from sglang_kvcached import hooks

    os.environ.setdefault(RUN_VARIABLE, secrets.token_hex(6))
    hooks.register()


@contextmanager
def elastic(**options: Any) -> Iterator[None]:
    """Make the engines elastic that are started inside; `options` are settings as in docs/sglang.md.

    They reach the engine's processes as variables of the environment, which is as before at the end. Raises
    ConfigError for an unknown or illegal setting, UnsupportedError for an engine that cannot be used.
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
