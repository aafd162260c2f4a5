"""Announce a rank's KV cache to the ledger and to the user, once the geometry is known."""

from __future__ import annotations

import logging

from kvcached_core.config import Config
from kvcached_core.errors import ConfigError
from kvcached_core.geometry import Geometry
from kvcached_core.ledger import Account
from kvcached_core.units import format_size

_log = logging.getLogger(__name__)


def require_limit_for_request(limit_bytes: int, needed_bytes: int, tokens: int, remedy: str) -> None:
    """Raise ConfigError if one request of `tokens` tokens needs more bytes than the limit.

    `remedy` ends the message; it names the engine options to change.
    """
    if needed_bytes > limit_bytes:
        raise ConfigError(
            f"the limit of {format_size(limit_bytes)} is less than the {format_size(needed_bytes)} that one "
            f"request of {tokens} tokens needs: {remedy}"
        )


def floor_bytes(settings: Config, capacity_bytes: int, needed_bytes: int) -> int:
    """Return a rank's floor in bytes: the setting, or for `auto` the longest request (`needed_bytes`)."""
    return needed_bytes if settings.floor is None else settings.floor.of(capacity_bytes)


def describe_to_ledger(account: Account, geometry: Geometry) -> None:
    """Write a rank's geometry to the ledger, before its first lease."""
    account.describe(
        page_bytes=geometry.page_bytes,
        granule_bytes=geometry.granule_bytes,
        granule_count=geometry.granule_count,
        blocks_per_granule=geometry.blocks_per_granule,
        block_count=geometry.block_count,
        stride_bytes=geometry.stride_bytes,
    )


def log_start(driver_name: str, geometry: Geometry, block_tokens: int, account: Account) -> None:
    """Log one line that tells users the engine is elastic. `block_tokens`: tokens in a block."""
    _log.info(
        "kvcached backend: driver %s, %s (%d tokens), virtual capacity %s, floor %s, limit %s, "
        "engine %s in ledger %s",
        driver_name,
        geometry.describe(),
        geometry.blocks_per_granule * block_tokens,
        format_size(geometry.granule_count * geometry.granule_bytes),
        format_size(account.floor_bytes),
        format_size(account.limit_bytes),
        account.name,
        account.ledger_path,
    )
