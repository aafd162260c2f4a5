"""The ledger: one file per device, in which the engines that share the device agree on how much each holds.

A worker uses an `Account`, its scheduler a `SchedulerView`; `snapshot` and `tools` are for operators. A name
is imported when it is first used, so a tool that only reads the ledger imports only that part.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.snapshot import DeviceSnapshot, OwnerSnapshot, snapshot

if TYPE_CHECKING:
    from kvcached_core.ledger.account import Account
    from kvcached_core.ledger.invariants import check
    from kvcached_core.ledger.scheduler_view import EngineUsage, SchedulerView
    from kvcached_core.ledger.slots import SlotGeometry
    from kvcached_core.ledger.tools.control import (
        Change,
        NoSuchEngineError,
        Outcome,
        look,
        set_floor,
        set_limit,
        set_weight,
        wait_until_holds,
    )

__all__ = [
    "Account",
    "Change",
    "DeviceSnapshot",
    "EngineUsage",
    "NoSuchEngineError",
    "Outcome",
    "OwnerSnapshot",
    "Runtime",
    "SchedulerView",
    "SlotGeometry",
    "check",
    "look",
    "set_floor",
    "set_limit",
    "set_weight",
    "snapshot",
    "wait_until_holds",
]

_MODULES = {
    "Account": "account",
    "Change": "tools.control",
    "EngineUsage": "scheduler_view",
    "NoSuchEngineError": "tools.control",
    "Outcome": "tools.control",
    "SchedulerView": "scheduler_view",
    "SlotGeometry": "slots",
    "check": "invariants",
    "look": "tools.control",
    "set_floor": "tools.control",
    "set_limit": "tools.control",
    "set_weight": "tools.control",
    "wait_until_holds": "tools.control",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
