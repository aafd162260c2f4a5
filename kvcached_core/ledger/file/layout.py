"""Where each word of a ledger file is, who writes it, and what its death means.

A file is a header and slots of 8-byte little-endian words; texts are utf-8, zero padded. Both the header
and a slot grow only at their end (a minor version); their sizes stand in the header, so that versions
which differ only there work on one file. Byte counts are per rank, which is per slot. Words that end in _ms
are milliseconds of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from kvcached_core.histogram import MAP, RECLAIM, Buckets

WORD = 8
MAGIC = int.from_bytes(b"KVLEDGER", "little")
MAJOR, MINOR = 1, 2
HEADER_BYTES, SLOT_BYTES, SLOT_COUNT = 512, 1024, 64
WORD_LIMIT = 1 << 62  # every value of every field is below it; a greater one is damage

FREE = 0  # `claim` of a slot that nobody has
UNHEARD = 1  # `claim` of a slot whose owner lives but has not yet written its numbers into this file
# The first of the fields that came with a minor version: the claim for which they hold, since an owner of the
# version before writes none of them.
MINOR_1, MINOR_2 = "spoken_claim", "timed_claim"
FIRST_CLAIM = 16  # claims of owners are random numbers from here on, new for every claim


class Field(NamedTuple):
    """One field. `writer`: owner (worker), engine (scheduler), tool or any; `locked`: under the lock."""

    name: str
    writer: str
    locked: bool
    meaning: str
    at_death: str = "ignored"
    text_bytes: int = 0
    series: str = ""  # of fields with the same one the table shows a row


HEADER = (
    Field("magic", "maker", True, "KVLEDGER"),
    Field("major", "maker", True, "another one is refused while its owners live"),
    Field("minor", "maker", True, "more fields at the end; nothing else may differ"),
    Field("header_bytes", "maker", True, "where slot 0 begins"),
    Field("slot_bytes", "maker", True, "distance of two slots"),
    Field("slot_count", "maker", True, "how many slots"),
    Field("capacity_bytes", "maker", True, "what the device holds"),
    Field("headroom_bytes", "maker", True, "what is never leased"),
    Field("generation", "maker", True, "random; tells a file that was made anew from the one before"),
    Field("free_bytes", "any", True, "what the driver called free at the latest lease"),
    Field("total_bytes", "any", True, "what the driver called total at the latest lease"),
    Field("uuid", "maker", True, "the device", text_bytes=64),
    Field("outside_bytes", "any", True, "what the ledger could not explain at the latest lease"),
)

_COUNTED = "counted until the slot is swept"


def _control(what: str, meaning: str) -> tuple[Field, ...]:
    return (
        Field(f"{what}_wanted", "tool", True, meaning),
        Field(f"{what}_wanted_generation", "tool", True, "raised after the value it belongs to"),
        Field(f"{what}_applied", "owner", False, "what the owner goes by"),
        Field(f"{what}_applied_generation", "owner", False, "the acknowledgement, after its value"),
    )


def _times(buckets: Buckets, meaning: str) -> tuple[Field, ...]:
    return tuple(Field(word, "owner", False, meaning, series=buckets.what) for word in buckets.words)


SLOT = (
    Field(
        "claim", "owner", True, "0 free, 1 not heard of, else the identity of this claim", "set to 0 first"
    ),
    Field("rank", "owner", True, "which worker of the instance"),
    Field("worker_pid", "owner", True, "for people; says nothing of liveness"),
    Field("instance", "owner", True, "with rank the key", text_bytes=64),
    Field("name", "owner", True, "what tools call it; unique among live instances", text_bytes=64),
    Field("engine", "owner", True, "vllm or sglang and its version", text_bytes=32),
    Field("model", "owner", True, "for people", text_bytes=128),
    Field("page_bytes", "owner", False, "one page"),
    Field("granule_bytes", "owner", False, "one page in every segment; 0 before describe()"),
    Field("granule_count", "owner", False, "of the whole reserved range"),
    Field("blocks_per_granule", "owner", False, "blocks wholly inside one granule"),
    Field("block_count", "owner", False, "of the whole reserved range"),
    Field("stride_bytes", "owner", False, "distance of two blocks in a segment"),
    *_control("limit", "bytes it may never exceed; the capacity stands for the device"),
    *_control("floor", "bytes it can always get back"),
    *_control("weight", "its share when there is not enough"),
    Field(
        "leased_bytes", "owner", False, "promised; raised under the lock before memory is created", _COUNTED
    ),
    Field("ready_bytes", "owner", False, "backed by handles that exist", _COUNTED),
    Field("mapped_bytes", "owner", False, "mapped in the arena", _COUNTED),
    Field("ceiling_bytes", "owner", False, "max(limit, what was leased when the limit was lowered)"),
    Field("private_now_bytes", "owner", False, "taken outside the KV cache now", _COUNTED),
    Field("private_peak_bytes", "owner", False, "what that may become", _COUNTED),
    Field("created_granules", "owner", False, "ever created, less those withdrawn"),
    Field("released_granules", "owner", False, "ever released; only grows"),
    Field("demand_bytes", "owner", False, "wanted and not leased"),
    Field("reclaim_bytes", "any", True, "asked to give back"),
    Field("leases", "owner", False, "leases that got something"),
    Field("lease_bytes", "owner", False, "sum of all that was leased"),
    Field("refusals", "owner", False, "leases that got less than asked for"),
    Field("maps", "owner", False, "granules ever mapped"),
    Field("unmaps", "owner", False, "granules ever unmapped"),
    Field("create_failures", "owner", False, "promises that the driver could not keep"),
    Field("wanted_bytes", "engine", False, "the lease the scheduler wants, absolute"),
    Field("ordered_granules", "engine", False, "granules ever ordered to be released"),
    Field("used_bytes", "engine", False, "in blocks that requests hold"),
    Field("cached_bytes", "engine", False, "in blocks that only the prefix cache keeps"),
    Field("stranded_bytes", "engine", False, "the rest of partly used granules"),
    Field("evictions", "engine", False, "cached blocks ever evicted for memory"),
    Field("preemptions", "engine", False, "requests ever preempted"),
    Field("busy", "engine", False, "1 while requests run"),
    # Minor 1. An owner of minor 0 never writes these: they hold only where `spoken_claim` is the claim.
    Field("spoken_claim", "owner", True, "the claim for which the words below hold"),
    Field("needed_bytes", "engine", False, "of wanted_bytes: what requests hold or are about to take"),
    Field("idle_since_ms", "engine", False, "0 while requests run, else when the last one ended"),
    Field("target_bytes", "any", True, "asked to hold at most this; 0 is not asked"),
    Field("must_bytes", "any", True, "likewise for the floor of another: by preemption if need be"),
    Field("asked_until_ms", "any", True, "when what is asked lapses, unless it is asked again"),
    Field("short_at_ms", "owner", True, "when it last wanted more than it got"),
    Field(
        "coming_bytes",
        "owner",
        True,
        "of its demand, what is on its way: next, or asked of others",
    ),
    Field("kept_until_ms", "owner", True, "until then what its requests need goes to floors only"),
    Field("starting_bytes", "owner", True, "claimed by an engine that waits for its start"),
    Field("queued_at_ms", "owner", True, "since when it waits for its start"),
    Field("reclaims", "any", True, "times asked to give back"),
    # Minor 2.
    Field("timed_claim", "owner", True, "the claim for which the words below hold"),
    Field("created_most", "engine", False, "of those created, what is counted on: the rest is to go; 0: all"),
    Field("asked_since_ms", "any", True, "when what is asked was asked first"),
    *_times(MAP, "counts of maps of a granule by how long they took, each once, and the sum"),
    *_times(RECLAIM, "likewise from being asked to give back until it is met"),
)


def _offsets(fields: Iterable[Field]) -> tuple[dict[str, int], int]:
    """Return the index in words of each field, and how many words there are."""
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
    """Read a text field; bytes that are no utf-8 show as replacement characters."""
    return data.split(b"\0", 1)[0].decode("utf-8", "replace")


def table() -> str:
    """Return the slot as a Markdown table, as docs/design.md shows it."""
    rows = ["| field | who writes | under the lock | at death | meaning |", "|---|---|---|---|---|"]
    for _, group in itertools.groupby(SLOT, key=lambda field: field.series or field.name):
        field, *more = group
        name = f"{field.name} to {more[-1].name}" if more else field.name
        locked = "yes" if field.locked else "no"
        rows.append(f"| {name} | {field.writer} | {locked} | {field.at_death} | {field.meaning} |")
    return "\n".join(rows)
