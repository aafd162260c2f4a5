"""Counts granules and blocks again, one by one, to check the counts that `GranuleTable` keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcached_core.scheduler.granule_table import GranuleTable


def recount(of: GranuleTable[Any]) -> dict[str, tuple[object, object]]:
    """Return pairs of numbers that must be equal: as kept, and counted again. Looks at all granules."""
    size, mapped, used = of.blocks_per_granule, of.mapped_set.granules(), of._used
    unmapped = set(range(of.granule_count)).difference(mapped)
    clean = {g: len(of._clean[g]) for g in mapped}
    empty = {g for g in mapped if clean[g] == size}
    clean_ids = [block.block_id for block in of.clean()]
    ages = list(of._idle.values())
    return {
        "clean": (of.clean_blocks, len(clean_ids)),
        "used": (of.used_blocks, sum(used)),
        "too many": ([g for g in mapped if not 0 <= used[g] <= size - clean[g]], []),
        "unmapped": ([g for g in unmapped if of._clean[g] or used[g]], []),
        "empty": (of.empty, len(empty)),
        "idle": (set(of._idle), {g for g in mapped if not used[g] and clean[g] < size}),
        "ages": (ages, sorted(ages)),
        "busy": (of.busy, sum(count > 0 for count in used)),
        "open": (sorted({*of._open} - unmapped), [g for g in mapped if clean[g]]),
        "open twice": (len(of._open), len({*of._open})),
        "empties": (empty - of._empties.listed(), set()),
        "block 0": (used[0] > 0 and 0 in clean and 0 not in clean_ids, True),
        "doubles": (len(clean_ids), len(set(clean_ids))),
    }
