"""Estimates of the bytes that each rank of an engine will take, made before it loads."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from kvcached_core.units import GIB, format_size

_log = logging.getLogger(__name__)

# Beside the weights and the CUDA context: for an 8B model on an H100, about 1.2 GiB for the largest step's
# activations and 0.6 GiB for CUDA graphs.
DEVICE_BYTES = 2 * GIB
HOST_BYTES = GIB  # activations, compiled code and the allocator of a process that has imported everything
_MARGIN = 1.1


def estimated(subject: str, estimate: Callable[[], int]) -> int:
    """Return `estimate()`. If it fails, warn and return 0: a missing estimate must not stop an engine."""
    try:
        return estimate()
    except Exception as error:
        _log.warning("kvcached: cannot estimate %s before loading (%s): it counts as 0", subject, error)
        return 0


def private_bytes(weight_bytes: Callable[[], int], on_host: bool) -> int:
    """Return a rank's peak bytes outside its KV cache, without CUDA context and communication buffers.

    `weight_bytes` returns the bytes of the weights on this rank.
    """
    weights = estimated("the size of the weights", weight_bytes)
    _log.info("kvcached: the weights are estimated at %s on each rank", format_size(weights))
    return weights + (HOST_BYTES if on_host else DEVICE_BYTES)


def longest_request_bytes(tokens: int, token_bytes: Callable[[], int]) -> int:
    """Return the KV cache bytes of a request of `tokens` tokens with full attention, plus a margin.

    For layers with a sliding window this is an upper bound.
    """
    return estimated("the floor", lambda: math.ceil(_MARGIN * tokens * token_bytes()))
