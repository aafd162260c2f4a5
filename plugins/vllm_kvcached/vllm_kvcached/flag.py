"""The flag `--kv-cache-backend`, which sets vLLM's own `--worker-cls` and `--scheduler-cls`."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

from vllm.engine import arg_utils

from kvcached_core import config
from kvcached_core.errors import KVCachedError
from vllm_kvcached import seams, support
from vllm_kvcached.names import SCHEDULER, WORKER

FLAG = "--kv-cache-backend"
_SETTINGS = "additional_config"  # vLLM's field; its key `kvcached` holds this plugin's settings
_STOCK = {"worker_cls": "auto", "scheduler_cls": None}
_ELASTIC = {"worker_cls": WORKER, "scheduler_cls": SCHEDULER}


class BackendAction(argparse.Action):
    """Sets worker and scheduler classes. Overrides ENABLE_KVCACHED, never --worker-cls or --scheduler-cls."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Set worker_cls and scheduler_cls, or reset them to vLLM's defaults."""
        for name, elastic in _ELASTIC.items():
            present = getattr(namespace, name, _STOCK[name])
            if present not in (elastic, _STOCK[name]):
                if values == "kvcached":
                    option = name.replace("_", "-")
                    parser.error(f"{FLAG} kvcached brings its own --{option}: leave out --{option} {present}")
                continue
            setattr(namespace, name, elastic if values == "kvcached" else _STOCK[name])
        os.environ[config.SWITCH_VARIABLE] = "1" if values == "kvcached" else "0"
        if values == "kvcached":
            _require_or_exit(parser, getattr(namespace, _SETTINGS, None))


def install() -> None:
    """Wrap `EngineArgs.add_cli_args`. A second call does nothing."""
    original: Callable[[Any], Any] = arg_utils.EngineArgs.add_cli_args
    if getattr(original, "_kvcached", False):
        return

    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        return add_flag(original(parser))

    add_cli_args._kvcached = True  # type: ignore[attr-defined]
    arg_utils.EngineArgs.add_cli_args = staticmethod(add_cli_args)


def add_flag(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flag to vLLM's parser. With ENABLE_KVCACHED on, `kvcached` is the default."""
    if FLAG in parser._option_string_actions:
        return parser  # vLLM has its own option of this name
    group = parser.add_argument_group("kvcached", "Elastic KV cache (plugin vllm-kvcached)")
    group.add_argument(
        FLAG,
        choices=["default", "kvcached"],
        action=BackendAction,
        dest=argparse.SUPPRESS,
        help="memory of the KV cache: 'default' is vLLM's own, 'kvcached' comes and goes with the load and "
        "is shared between engines (default: 'kvcached' if ENABLE_KVCACHED is on)",
    )
    try:
        asked_for = config.enabled(os.environ)
    except KVCachedError as error:
        parser.error(str(error))
    if asked_for:
        _require_or_exit(parser, None)
        parser.set_defaults(**_ELASTIC)
    for action in parser._actions:
        if action.dest == _SETTINGS:
            action.type = _checked(action.type)
    return parser


def _require_or_exit(parser: argparse.ArgumentParser, additional: object) -> None:
    try:
        seams.require()
        support.settings_in(additional)
    except KVCachedError as error:
        parser.error(str(error))


def _checked(convert: Any) -> Callable[[str], Any]:
    """Return a converter for `--additional-config` that checks the settings if the backend is kvcached.

    The engine's process checks them again, but only after it has imported all of vLLM.
    """

    @functools.wraps(convert)
    def additional_config(text: str) -> Any:
        value = convert(text)
        if config.enabled(os.environ):
            try:
                support.settings_in(value)
            except KVCachedError as error:
                raise argparse.ArgumentTypeError(str(error)) from None
        return value

    return additional_config
