"""vLLM's NVML library, and the device of a rank, found without a CUDA context: a context takes memory."""

from __future__ import annotations

import logging
from typing import Any

from vllm.platforms import current_platform

_log = logging.getLogger(__name__)


def library() -> Any:
    """Return NVML, initialized; raises NVML's error if the machine has none."""
    from vllm.third_party import pynvml

    pynvml.nvmlInit()
    return pynvml


def uuid_of(local_rank: int) -> str | None:
    """Return the UUID of the device that a rank will use, or None if it is not known yet."""
    try:
        library()  # without NVML, the platform would create a CUDA context to read the UUID
        return str(current_platform.get_device_uuid(local_rank))
    except Exception as error:
        _log.debug("the device of rank %d is not known yet: %s", local_rank, error)
        return None
