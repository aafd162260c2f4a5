"""The flag `--kv-cache-backend`: it sets ENABLE_KVCACHED, which the engine's processes inherit."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from kvcached_core import config
from kvcached_core.errors import KVCachedError
from sglang_kvcached import support

FLAG = "--kv-cache-backend"
_DESTINATION = "kvcached_backend"


def add_flag(result: Any, parser: argparse.ArgumentParser) -> None:
    """Add the flag to a parser that has SGLang's own options (after `ServerArgs.add_cli_args`)."""
    if FLAG in parser._option_string_actions:
        return  # an option of SGLang with this name is left alone
    group = parser.add_argument_group("kvcached", "Elastic KV cache (plugin sglang-kvcached)")
    group.add_argument(
        FLAG,
        choices=["default", "kvcached"],
        dest=_DESTINATION,
        help="KV cache memory: 'default' is SGLang's own, allocated once; 'kvcached' grows and shrinks with "
        "the load and is shared between engines (default: 'kvcached' if ENABLE_KVCACHED is on)",
    )


def read_flag(
    original: Callable[..., Any], owner: type, args: argparse.Namespace, prepare: Callable[[], None]
) -> Any:
    """Read the choice from a command line (around `ServerArgs.from_cli_args`); it overrides the variable.

    `prepare` is called if the backend is chosen. Ends the process with status 2 and one sentence if the
    backend cannot be used.
    """
    choice = getattr(args, _DESTINATION, None)
    if choice is not None:
        os.environ[config.SWITCH_VARIABLE] = "1" if choice == "kvcached" else "0"
    try:
        chosen = config.enabled(os.environ)
        if chosen:
            prepare()
        server_args = original(owner, args)
        if chosen:
            support.refuse(support.unresolved_options(server_args))
    except KVCachedError as error:
        print(f"sglang: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    return server_args
