"""What NVML says of a device: it needs no context there, which would take memory itself."""

from __future__ import annotations

import logging
import os

from vllm.platforms import current_platform

from kvcached_core.driver.base import MemoryInfo

_log = logging.getLogger(__name__)


def uuid_of(local_rank: int) -> str | None:
    """Return the UUID of the device that a rank will use, None where it cannot be known yet."""
    try:
        from vllm.third_party import pynvml

        pynvml.nvmlInit()  # without the library, the platform would make a context to ask
        return str(current_platform.get_device_uuid(local_rank))
    except Exception as error:
        _log.debug("the device of rank %d is not known yet: %s", local_rank, error)
        return None


def memory_of(uuid: str) -> MemoryInfo:
    """Return free and total memory of a device."""
    from vllm.third_party import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(uuid))
    return MemoryInfo(int(memory.free), int(memory.total))


def process_bytes(uuid: str) -> int:
    """Return what this process holds of a device, its context included; 0 where it is not to be had.

    Takes about a millisecond. Some containers do not see their own processes.
    """
    try:
        from vllm.third_party import pynvml

        pynvml.nvmlInit()
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByUUID(uuid))
    except Exception as error:
        _log.debug("the memory of this process on %s is not known: %s", uuid, error)
        return 0
    return sum(int(each.usedGpuMemory or 0) for each in processes if each.pid == os.getpid())
