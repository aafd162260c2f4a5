"""Invariants that every snapshot of a ledger must satisfy; they are numbered as in docs/design.md."""

from __future__ import annotations

from kvcached_core.ledger.snapshot import DeviceSnapshot, OwnerSnapshot


def check(device: DeviceSnapshot) -> list[str]:
    """Return a sentence for each invariant that does not hold.

    Fields are compared only in a settled snapshot; otherwise they may be of different moments.
    """
    if device.damage:
        return [f"{device.uuid}: {device.damage}"]
    wrong, where = [], device.uuid
    if device.settled:
        if device.ready_bytes > device.capacity_bytes:
            wrong.append(f"I1: {device.ready_bytes} bytes are ready on {where} of {device.capacity_bytes}")
        most = device.capacity_bytes - device.headroom_bytes
        if device.leased_bytes > most:
            wrong.append(f"I1: {device.leased_bytes} bytes are leased on {where}, where {most} can be leased")
        for owner in device.owners:
            wrong += _check_owner(owner) if owner.written else []
    floors = sum(owner.floor_applied for owner in device.owners)
    if floors > device.capacity_bytes:
        wrong.append(f"I3: floors of {floors} bytes on {where} of {device.capacity_bytes}")
    keys = [(owner.instance, owner.rank) for owner in device.owners if owner.live and owner.written]
    if len(set(keys)) != len(keys):
        wrong.append(f"I4: a rank has two slots on {where}: {sorted(keys)}")
    return wrong


def _check_owner(owner: OwnerSnapshot) -> list[str]:
    wrong = []
    who = f"{owner.name} rank {owner.rank}"
    if not owner.mapped_bytes <= owner.ready_bytes <= owner.leased_bytes <= owner.ceiling_bytes:
        wrong.append(
            f"I2: {who} has mapped {owner.mapped_bytes}, ready {owner.ready_bytes}, "
            f"leased {owner.leased_bytes}, under a ceiling of {owner.ceiling_bytes}"
        )
    if owner.released_granules > owner.created_granules:
        wrong.append(
            f"I2: {who} released {owner.released_granules} granules, created {owner.created_granules}"
        )
    return wrong
