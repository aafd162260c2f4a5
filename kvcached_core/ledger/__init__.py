"""The ledger: one file per device by which engines that share it agree on who holds how much.

`Account` is a worker's side, `Desk` its scheduler's, `snapshot` and `control` are for tools. Names are
imported when they are first used: a tool that only looks needs no half of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvcached_core.ledger.runtime import Runtime
from kvcached_core.ledger.snapshot import DeviceSnapshot, OwnerSnapshot, snapshot

if TYPE_CHECKING:
    from kvcached_core.ledger.account import Account
    from kvcached_core.ledger.control import (
        Change,
        NoSuchEngineError,
        Outcome,
        look,
        set_floor,
        set_limit,
        set_weight,
        wait_until_holds,
    )
    from kvcached_core.ledger.desk import Desk
    from kvcached_core.ledger.invariants import check
    from kvcached_core.ledger.place import SlotGeometry

__all__ = [
    "Account",
    "Change",
    "Desk",
    "DeviceSnapshot",
    "NoSuchEngineError",
    "Outcome",
    "OwnerSnapshot",
    "Runtime",
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
    "Account": "account", "Change": "control", "Desk": "desk", "NoSuchEngineError": "control",
    "Outcome": "control", "SlotGeometry": "place", "check": "invariants", "look": "control",
    "set_floor": "control", "set_limit": "control", "set_weight": "control", "wait_until_holds": "control",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
