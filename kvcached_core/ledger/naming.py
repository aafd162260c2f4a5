"""Names of engines for people: unique among living instances, over all devices."""

from __future__ import annotations

import logging

from kvcached_core.ledger.file.layout import decode_text, encode_text
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.snapshot import snapshot

_log = logging.getLogger(__name__)
_BYTES = 64


def choose_name(runtime: Runtime, name: str, instance: str) -> str:
    """Return `name`, or `name-2` and so on if another living instance has it.

    All ranks of an instance get the same name. The lock of names is held.
    """
    wanted = decode_text(encode_text(name or "engine", _BYTES))
    owners = [owner for device in snapshot(runtime) for owner in device.owners if owner.live]
    for owner in owners:
        if owner.instance == instance:  # another rank has chosen the name
            return owner.name
    others = {owner.name for owner in owners}
    chosen, number = wanted, 1
    while chosen in others:
        number += 1
        suffix = f"-{number}"
        chosen = decode_text(encode_text(wanted, _BYTES - len(suffix))) + suffix
    if chosen != wanted:
        _log.warning("another engine is named %s: this one is %s", wanted, chosen)
    return chosen
