"""The JSON output of every command in version 1, as JSON Schema. Scripts may rely on it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jsonschema

from kvcached_core.ledger.snapshot import OwnerSnapshot

_BYTES = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}
_YES = {"type": "boolean"}
_NUMBER = {"type": "number"}


def _object(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object with exactly these properties."""
    more = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties, **more}


def _list(of: Any) -> dict[str, Any]:
    return {"type": "array", "items": of}


def _answer(**properties: Any) -> dict[str, Any]:
    return _object(version={"const": 1}, **properties)


_BUCKETS = {"type": "object", "minProperties": 9, "additionalProperties": _BYTES}
_KINDS = {
    "int": _BYTES, "str": _TEXT, "bool": _YES,
    "HistogramReading": _object(count=_BYTES, sum_seconds=_NUMBER, buckets=_BUCKETS),
}  # fmt: skip
_NAMES = {"written": "heard"}  # fields of OwnerSnapshot that have another name in the JSON
_ENGINE = _object(
    **{_NAMES.get(field.name, field.name): _KINDS[str(field.type)]
       for field in dataclasses.fields(OwnerSnapshot)},
    **dict.fromkeys(("spare_bytes", "limit_bytes", "floor_bytes", "weight", "asked_bytes"), _BYTES),
    state={"enum": ["ended", "returning", "waiting", "starting", "over limit", "short", "asked", "busy",
                    "idle", "running"]},
)  # fmt: skip
_DEVICE = _object(
    uuid=_TEXT, capacity_bytes=_BYTES, headroom_bytes=_BYTES, free_bytes=_BYTES, total_bytes=_BYTES,
    leased_bytes=_BYTES, ready_bytes=_BYTES, outside_bytes=_BYTES, damage=_TEXT, engines=_list(_ENGINE),
)  # fmt: skip


def _changed(**more: Any) -> dict[str, Any]:
    rank = _object(
        device=_TEXT, rank=_BYTES, limit_bytes=_BYTES, floor_bytes=_BYTES, generation=_BYTES,
        acknowledged=_YES, holds=_YES, **more,
    )  # fmt: skip
    return _answer(name=_TEXT, holds=_YES, ranks=_list(rank))


_LIST = _answer(devices=_list(_DEVICE))
SCHEMAS: dict[str, dict[str, Any]] = {
    "list": _LIST,
    "kvtop": _LIST,
    "watch": _answer(wall_seconds=_NUMBER, devices=_list(_DEVICE)),
    "limit": _changed(leased_bytes=_BYTES),
    "limit-percent": _changed(leased_bytes=_BYTES),
    "floor": _changed(),
    "weight": _changed(weight=_BYTES),
    "trim": _answer(
        name=_TEXT, holds=_YES,
        ranks=_list(_object(device=_TEXT, rank=_BYTES, before_bytes=_BYTES, asked_bytes=_BYTES,
                            leased_bytes=_BYTES, given_bytes=_BYTES, holds=_YES)),
    ),
    "delete": _answer(
        name=_TEXT,
        slots=_list(_object(device=_TEXT, slot=_BYTES, rank=_BYTES, live=_YES,
                            result={"enum": ["removed", "kept", "set back"]})),
    ),
    "history": _answer(events=_list({
        "type": "object", "required": ["kind", "at_seconds", "wall_seconds", "device", "name", "slot"],
        "properties": {"kind": _TEXT, "at_seconds": _NUMBER, "wall_seconds": _NUMBER},
    })),
    "check": _answer(
        sound=_YES, devices=_list(_object(uuid=_TEXT, settled=_YES, engines=_BYTES, violations=_list(_TEXT)))
    ),
    "doctor": _answer(
        checks=_list(_object(subject=_TEXT, status={"enum": ["ok", "info", "warning", "error"]}, text=_TEXT)),
        settings=_list(_object(name=_TEXT, variable=_TEXT, value=_TEXT, source=_TEXT)),
    ),
    "export": _answer(samples=_list(_object(name=_TEXT, labels={"type": "object"}, value=_NUMBER))),
    "completion": _answer(shell=_TEXT, script=_TEXT),
    "help": _answer(topic={"type": ["string", "null"]}, help=_TEXT),
}  # fmt: skip


def validate(command: str, data: Any) -> None:
    """Raise ValidationError unless `data` follows the schema of the command."""
    jsonschema.validate(data, SCHEMAS[command])
