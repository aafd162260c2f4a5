"""Drivers by name and by the kind of device they serve; the built-in ones register like any plugin's.

A driver's plugin may have an attribute `device_type`: PyTorch's name for its devices, such as `cuda`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcached_core.config import Config
from kvcached_core.errors import ConfigError, UnsupportedError
from kvcached_core.hooks import hookimpl, plugin_manager

if TYPE_CHECKING:
    import pluggy

    from kvcached_core.driver.base import Driver

HOST_TYPE = "cpu"  # PyTorch's name for the device whose memory is the machine's own


class HostPlugin:
    """Offers the `host` driver."""

    device_type = HOST_TYPE

    @hookimpl
    def kvcached_driver(self, name: str, capacity_bytes: int) -> Driver | None:
        """Return the host driver."""
        if name != "host":
            return None
        from kvcached_core.driver.host import HostDriver

        return HostDriver(capacity_bytes)


class CudaPlugin:
    """Offers the `cuda` driver; CuPy and cuda-bindings are imported when a driver is opened."""

    device_type = "cuda"

    @hookimpl
    def kvcached_driver(self, name: str, device_index: int, capacity_bytes: int) -> Driver | None:
        """Return the cuda driver, or raise UnsupportedError."""
        if name != "cuda":
            return None
        try:
            from kvcached_core.driver.cuda import CudaDriver
        except ImportError as error:
            raise UnsupportedError(
                f"the cuda driver needs CuPy and cuda-bindings ({error}): install the extra cuda12 or cuda13"
            ) from error
        return CudaDriver(device_index, capacity_bytes)


def open_driver(
    name: str, device_index: int = 0, capacity_bytes: int = 0, manager: pluggy.PluginManager | None = None
) -> Driver:
    """Return the driver called `name`; `capacity_bytes` caps its memory (0: all of the device).

    Raises ConfigError, with the known names, if no plugin has it, and UnsupportedError if the device or a
    package is missing.
    """
    hooks = (manager or plugin_manager()).hook.kvcached_driver
    driver: Driver | None = hooks(name=name, device_index=device_index, capacity_bytes=capacity_bytes)
    if driver is None:
        known = ", ".join(sorted(hook.plugin_name for hook in hooks.get_hookimpls()))
        raise ConfigError(f"driver {name!r} is not known: expected one of {known}")
    return driver


def is_host(device_type: str) -> bool:
    """Say whether devices of this PyTorch type use the machine's own memory."""
    return device_type == HOST_TYPE


def driver_name(wanted: str, device_type: str, manager: pluggy.PluginManager | None = None) -> str:
    """Return the name of the driver for a PyTorch device type: `wanted`, or the type's first one for `auto`.

    A plugin without `device_type` may serve any device but the host. Raises ConfigError if `wanted` serves
    another type, or if no driver serves this one.
    """
    hooks = (manager or plugin_manager()).hook.kvcached_driver.get_hookimpls()
    served = {hook.plugin_name: getattr(hook.plugin, "device_type", None) for hook in hooks}
    fitting = [name for name, kind in served.items() if kind == device_type]
    if wanted == "auto":
        if not fitting:
            raise ConfigError(f"kvcached.driver='auto': no driver serves {device_type}, name one")
        return fitting[0]
    if served.get(wanted) not in (device_type, None) or (is_host(device_type) and wanted not in fitting):
        raise ConfigError(
            f"kvcached.driver={wanted!r}: this engine runs on {device_type}, expected "
            f"{' or '.join((*fitting, 'auto'))}"
        )
    return wanted


def open_for_engine(settings: Config, device_type: str, device_index: int | None = None) -> Driver:
    """Return the driver for an engine's device; on the host, one that shares `host_capacity` of its memory.

    Raises ConfigError for a driver that does not serve the device, UnsupportedError as `open_driver`.
    """
    name, index = driver_name(settings.driver, device_type), device_index or 0
    if not is_host(device_type):
        return open_driver(name, index)
    whole = open_driver(name, index)
    total_bytes = whole.memory().total_bytes
    whole.close()
    return open_driver(name, index, settings.host_capacity.of(total_bytes))
