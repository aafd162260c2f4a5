"""Reads a device's memory through NVML, which needs no CUDA context and so takes no device memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from kvcached_core.driver.base import MemoryInfo

_log = logging.getLogger(__name__)


def _library() -> Any:
    """Return NVML, initialized. Raises ImportError, or NVML's error if there is no driver."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml


def memory_of(uuid: str, library: Callable[[], Any] = _library) -> MemoryInfo:
    """Return free and total memory of a device. Raises NVML's error if there is no such device.

    `library` returns NVML, initialized: an engine may bring its own.
    """
    nvml = library()
    memory = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(uuid))
    return MemoryInfo(int(memory.free), int(memory.total))


def process_bytes(uuid: str, library: Callable[[], Any] = _library) -> int:
    """Return the bytes that this process holds on a device, its CUDA context included; 0 if unknown.

    Takes about a millisecond. In some containers NVML does not see the process.
    """
    try:
        nvml = library()
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByUUID(uuid))
    except Exception as error:
        _log.debug("the memory of this process on %s is not known: %s", uuid, error)
        return 0
    return sum(int(each.usedGpuMemory or 0) for each in processes if each.pid == os.getpid())


def uuid_of(index: int, library: Callable[[], Any] = _library, visible: str | None = None) -> str | None:
    """Return the UUID of the device that CUDA will call `index`, or None if it cannot be known yet.

    `visible` is CUDA_VISIBLE_DEVICES (default: from the environment).
    """
    text = os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible
    try:
        nvml = library()
        name = str(index) if text is None else text.split(",")[index].strip()
        if not name.isdigit():
            return name if name.startswith("MIG-") else str(nvml.nvmlDeviceGetUUID(_by_prefix(nvml, name)))
        return str(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(int(name))))
    except Exception as error:
        _log.debug("the device %d is not known yet: %s", index, error)
        return None


def _by_prefix(nvml: Any, name: str) -> Any:
    """Return the handle of the one device whose UUID begins with `name`, as CUDA matches it."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    (found,) = [handle for handle in handles if str(nvml.nvmlDeviceGetUUID(handle)).startswith(name)]
    return found
