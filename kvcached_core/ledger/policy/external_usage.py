"""Memory of processes outside the ledger: computed from the driver's free memory, and reported."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.ledger.file.storage import Row
from kvcached_core.units import format_size

_log = logging.getLogger(__name__)

# Within this time the memory of an engine that died is freed, and the memory of one that grew is in its slot.
_LASTING_MS = 2000


class ExternalUsage:
    """Used bytes that no slot accounts for. Lasting growth by more than the headroom is a warning."""

    def __init__(self) -> None:
        self.bytes = 0
        self._reported: int | None = None
        self._changed_at_ms = 0  # when it began to differ from the reported value; 0: it does not differ

    def measure(self, rows: Iterable[Row], memory: MemoryInfo, device: str, headroom_bytes: int,
                now_ms: int) -> bool:  # fmt: skip
        """Measure again; return whether usage has changed for good by more than the headroom since the last
        report."""
        known = floors = 0
        for row in rows:
            known += row["ready_bytes"] + row["private_now_bytes"]
            floors += max(0, row["floor_applied"] - row["leased_bytes"])
        self.bytes = max(0, memory.total_bytes - memory.free_bytes - known)
        if self._reported is None:
            self._reported = self.bytes  # drivers and contexts that were there first
            return False
        grown = self.bytes - self._reported
        if abs(grown) <= max(headroom_bytes, 1):
            self._changed_at_ms = 0
            return False
        self._changed_at_ms = self._changed_at_ms or now_ms
        if now_ms - self._changed_at_ms < _LASTING_MS:
            return False
        self._reported, self._changed_at_ms = self.bytes, 0
        if grown > 0:
            short = floors - memory.free_bytes
            _log.warning(
                "processes that this ledger does not know took %s more of %s, %s in all%s. Engines in other "
                "containers have to share KVCACHED_RUNTIME_DIR to be known",
                format_size(grown), device, format_size(self.bytes),
                f"; {format_size(short)} of floors cannot be given back" if short > 0 else "",
            )  # fmt: skip
        return True
