"""The ledger: one file per device by which engines that share it agree on who holds how much.

`Account` is a worker's side, `Desk` its scheduler's, `snapshot` and `control` are for tools.
"""

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
from kvcached_core.ledger.runtime import Runtime
from kvcached_core.ledger.snapshot import DeviceSnapshot, OwnerSnapshot, snapshot

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
