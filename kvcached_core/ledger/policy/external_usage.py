"""Memory that processes outside the ledger take: seen in what the driver calls free, respected, told of."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.ledger.file.storage import Row
from kvcached_core.units import format_size

_log = logging.getLogger(__name__)


_LASTING_MS = (
    2000  # the memory of an engine that died, or has grown and not said so, is gone or known by then
)


class Outside:
    """What the ledger cannot explain, in bytes. Its lasting growth by more than the headroom is worth a
    warning."""

    def __init__(self) -> None:
        self.bytes = 0
        self._told: int | None = None
        self._changed_at_ms = 0  # since when it is otherwise than told; 0 while it is not

    def look(self, rows: Iterable[Row], memory: MemoryInfo, device: str, headroom_bytes: int,
             now_ms: int) -> bool:  # fmt: skip
        """Count anew; say whether it has changed for good, by more than the headroom, since that was last
        said."""
        known = floors = 0
        for row in rows:
            known += row["ready_bytes"] + row["private_now_bytes"]
            floors += max(0, row["floor_applied"] - row["leased_bytes"])
        self.bytes = max(0, memory.total_bytes - memory.free_bytes - known)
        if self._told is None:
            self._told = self.bytes  # what was there before is no news: drivers, contexts
            return False
        grown = self.bytes - self._told
        if abs(grown) <= max(headroom_bytes, 1):
            self._changed_at_ms = 0
            return False
        self._changed_at_ms = self._changed_at_ms or now_ms
        if now_ms - self._changed_at_ms < _LASTING_MS:
            return False
        self._told, self._changed_at_ms = self.bytes, 0
        if grown > 0:
            short = floors - memory.free_bytes
            _log.warning(
                "processes that this ledger does not know took %s more of %s, %s in all%s. Engines in other "
                "containers have to share KVCACHED_RUNTIME_DIR to be known",
                format_size(grown), device, format_size(self.bytes),
                f"; {format_size(short)} of floors cannot be given back" if short > 0 else "",
            )  # fmt: skip
        return True
