"""The layout of a ledger file: every field, its writer, and its fate when the owner of the slot dies.

A file is a header and slots of 8-byte little-endian words; a text is utf-8, padded with zeros. Header and
slot grow only at their end, in a minor version, and the header states their sizes: so versions that differ
only there can share a file. A slot holds one rank, so its byte counts are of that rank. Fields that end in
_ms are milliseconds of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from kvcached_core.histogram import MAP_BUCKETS, RECLAIM_BUCKETS, Buckets

WORD = 8
MAGIC = int.from_bytes(b"KVLEDGER", "little")
MAJOR, MINOR = 1, 2
HEADER_BYTES, SLOT_BYTES, SLOT_COUNT = 512, 1024, 64
WORD_LIMIT = 1 << 62  # every value of every field is below this; a greater value is damage

FREE = 0  # `claim` of a free slot
UNWRITTEN = 1  # `claim` of a slot whose living owner has not yet written its numbers into this file
# The first field of each minor version. It equals the slot's claim if the owner writes that version's fields.
# An owner of an earlier version leaves there the words of the slot's last owner.
MINOR_1, MINOR_2 = "spoken_claim", "timed_claim"
FIRST_CLAIM = 16  # claims of owners are random numbers from here on, new for every claim


class Field(NamedTuple):
    """One field.

    `writer`: maker (of the file), owner (worker), engine (scheduler), tool (kvctl) or any. `locked`: written
    only under the ledger's lock. `at_death`: how others treat the field once the owner of its slot has died.
    """

    name: str
    writer: str
    locked: bool
    meaning: str
    at_death: str = "ignored"
    text_bytes: int = 0
    series: str = ""  # the table shows fields of one series in one row


HEADER = (
    Field("magic", "maker", True, "KVLEDGER"),
    Field("major", "maker", True, "layout version; a file of another one is refused while its owners live"),
    Field("minor", "maker", True, "adds fields at the end of header and slot, and changes nothing else"),
    Field("header_bytes", "maker", True, "size of the header: slot 0 begins here"),
    Field("slot_bytes", "maker", True, "size of one slot"),
    Field("slot_count", "maker", True, "number of slots"),
    Field("capacity_bytes", "maker", True, "device memory that engines share"),
    Field("headroom_bytes", "maker", True, "part of the capacity that is never leased"),
    Field("generation", "maker", True, "random number; a file made anew has another one"),
    Field("free_bytes", "any", True, "free memory reported by the driver at the latest lease"),
    Field("total_bytes", "any", True, "total memory reported by the driver at the latest lease"),
    Field("uuid", "maker", True, "UUID of the device", text_bytes=64),
    Field("outside_bytes", "any", True, "memory used by processes outside the ledger, at the latest lease"),
)

_COUNTED = "counted until the slot is swept"


def _control(control: str, meaning: str) -> tuple[Field, ...]:
    return (
        Field(f"{control}_wanted", "tool", True, meaning),
        Field(f"{control}_wanted_generation", "tool", True, f"raised by 1 after each new {control}_wanted"),
        Field(f"{control}_applied", "owner", False, f"the {control} that the owner has applied"),
        Field(
            f"{control}_applied_generation",
            "owner",
            False,
            f"the {control}_wanted_generation that is applied; written after {control}_applied",
        ),
    )


def _times(buckets: Buckets, meaning: str) -> tuple[Field, ...]:
    return tuple(Field(word, "owner", False, meaning, series=buckets.prefix) for word in buckets.words)


SLOT = (
    Field(
        "claim",
        "owner",
        True,
        "0: free; 1: its living owner has yet to write it; else a random number",
        "set to 0 by the next sweep",
    ),
    Field("rank", "owner", True, "rank of the worker in its engine instance"),
    Field("worker_pid", "owner", True, "process id, for people; never used to tell whether the owner lives"),
    Field("instance", "owner", True, "id of the engine instance; with rank the key of a slot", text_bytes=64),
    Field("name", "owner", True, "name that tools use; unique among living instances", text_bytes=64),
    Field("engine", "owner", True, "vllm or sglang, with its version", text_bytes=32),
    Field("model", "owner", True, "model name, for people", text_bytes=128),
    Field("page_bytes", "owner", False, "size of a page"),
    Field("granule_bytes", "owner", False, "one page in every segment; 0 before describe()"),
    Field("granule_count", "owner", False, "granules in the whole reserved range"),
    Field("blocks_per_granule", "owner", False, "blocks that lie wholly inside one granule"),
    Field("block_count", "owner", False, "blocks in the whole reserved range"),
    Field("stride_bytes", "owner", False, "distance between two blocks in a segment"),
    *_control("limit", "most bytes that may be leased; the capacity if there is no limit"),
    *_control("floor", "bytes that the engine can always get back"),
    *_control("weight", "share of memory when demand exceeds the device, relative to other engines"),
    Field(
        "leased_bytes",
        "owner",
        False,
        "bytes promised to the owner; raised under the lock, before memory is created",
        _COUNTED,
    ),
    Field("ready_bytes", "owner", False, "bytes for which handles exist", _COUNTED),
    Field("mapped_bytes", "owner", False, "bytes mapped in the arena", _COUNTED),
    Field(
        "ceiling_bytes",
        "owner",
        False,
        "max(limit, leased_bytes when the limit was lowered); falls with leased_bytes",
    ),
    Field("private_now_bytes", "owner", False, "memory it uses outside the KV cache now", _COUNTED),
    Field("private_peak_bytes", "owner", False, "most memory it may use outside the KV cache", _COUNTED),
    Field("created_granules", "owner", False, "granules created so far, less those withdrawn"),
    Field("released_granules", "owner", False, "granules released so far; never falls"),
    Field("demand_bytes", "owner", False, "bytes wanted and not leased"),
    Field("reclaim_bytes", "any", True, "bytes that a reclaim asks the owner to give back"),
    Field("leases", "owner", False, "leases that were granted memory"),
    Field("lease_bytes", "owner", False, "bytes leased so far"),
    Field("refusals", "owner", False, "leases that got less than they asked for"),
    Field("maps", "owner", False, "granules mapped so far"),
    Field("unmaps", "owner", False, "granules unmapped so far"),
    Field("create_failures", "owner", False, "leases that the driver could not fill"),
    Field("wanted_bytes", "engine", False, "bytes that the scheduler wants leased in all"),
    Field("ordered_granules", "engine", False, "granules that the scheduler has ordered released so far"),
    Field("used_bytes", "engine", False, "bytes in blocks that requests hold"),
    Field("cached_bytes", "engine", False, "bytes in blocks that only the prefix cache keeps"),
    Field("stranded_bytes", "engine", False, "bytes of empty blocks in partly used granules"),
    Field("evictions", "engine", False, "cached blocks evicted so far to free memory"),
    Field("preemptions", "engine", False, "requests preempted so far"),
    Field("busy", "engine", False, "1 while requests run"),
    # Minor 1. An owner of minor 0 never writes these: they hold only where `spoken_claim` is the claim.
    Field("spoken_claim", "owner", True, "equals claim if the owner writes the fields of minor 1"),
    Field("needed_bytes", "engine", False, "part of wanted_bytes that requests hold or are about to take"),
    Field("idle_since_ms", "engine", False, "time at which the last request ended; 0 while requests run"),
    Field("target_bytes", "any", True, "most bytes that a reclaim lets the owner hold; 0: no reclaim"),
    Field(
        "must_bytes",
        "any",
        True,
        "the same for another engine's floor: the owner preempts requests if it must; 0: no reclaim",
    ),
    Field("asked_until_ms", "any", True, "time at which the reclaim lapses unless it is repeated"),
    Field("short_at_ms", "owner", True, "time of the latest lease that got less than it asked for"),
    Field(
        "coming_bytes",
        "owner",
        True,
        "part of demand_bytes that the next lease brings, or that others are asked to give back",
    ),
    Field(
        "kept_until_ms",
        "owner",
        True,
        "time until which memory that requests need is reclaimed only for another engine's floor",
    ),
    Field("starting_bytes", "owner", True, "memory claimed by an engine that waits to start"),
    Field("queued_at_ms", "owner", True, "time at which the engine began to wait for its start; else 0"),
    Field("reclaims", "any", True, "reclaims from the owner so far"),
    # Minor 2.
    Field("timed_claim", "owner", True, "equals claim if the owner writes the fields of minor 2"),
    Field(
        "created_most",
        "engine",
        False,
        "part of created_granules that the scheduler may use; the worker withdraws the rest; 0: all",
    ),
    Field("asked_since_ms", "any", True, "time at which the reclaim was first written"),
    *_times(MAP_BUCKETS, "histogram of the time to map a granule: a count for each bucket, and the sum"),
    *_times(RECLAIM_BUCKETS, "histogram of the time from a reclaim until it is met"),
)


def _offsets(fields: Iterable[Field]) -> tuple[dict[str, int], int]:
    """Return the index in words of each field, and the number of words."""
    at: dict[str, int] = {}
    words = 0
    for field in fields:
        at[field.name] = words
        words += field.text_bytes // WORD or 1
    return at, words


HEADER_AT, HEADER_WORDS = _offsets(HEADER)
SLOT_AT, SLOT_WORDS = _offsets(SLOT)
TEXT_BYTES = {field.name: field.text_bytes for field in (*HEADER, *SLOT) if field.text_bytes}
CONTROLS = ("limit", "floor", "weight")
ENGINE_WORDS = tuple(field.name for field in SLOT if field.writer == "engine")
ANY_WORDS = tuple(field.name for field in SLOT if field.writer == "any")
OWNER_WORDS = tuple(field.name for field in SLOT if field.writer == "owner" and not field.text_bytes)
TIMES = frozenset(field.name for field in SLOT if field.series)


def encode_text(text: str, size_bytes: int) -> bytes:
    """Return exactly `size_bytes` of utf-8, cut on a character boundary and zero padded."""
    cut = text.replace("\0", " ").encode("utf-8", "replace")[:size_bytes]
    return cut.decode("utf-8", "ignore").encode().ljust(size_bytes, b"\0")


def decode_text(data: bytes) -> str:
    """Read a text field; bytes that are not utf-8 become replacement characters."""
    return data.split(b"\0", 1)[0].decode("utf-8", "replace")


def table() -> str:
    """Return the fields of a slot as the Markdown table of docs/design.md."""
    rows = ["| field | who writes | under the lock | at death | meaning |", "|---|---|---|---|---|"]
    for _, group in itertools.groupby(SLOT, key=lambda field: field.series or field.name):
        field, *more = group
        name = f"{field.name} to {more[-1].name}" if more else field.name
        locked = "yes" if field.locked else "no"
        rows.append(f"| {name} | {field.writer} | {locked} | {field.at_death} | {field.meaning} |")
    return "\n".join(rows)
