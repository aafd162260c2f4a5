"""Drivers by name: the built-in ones register like anybody's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcached_core.errors import ConfigError, UnsupportedError
from kvcached_core.hooks import hookimpl, plugin_manager

if TYPE_CHECKING:
    import pluggy

    from kvcached_core.driver.base import Driver


class HostPlugin:
    """Offers the `host` driver."""

    @hookimpl
    def kvcached_driver(self, name: str, capacity_bytes: int) -> Driver | None:
        """Return the host driver."""
        if name != "host":
            return None
        from kvcached_core.driver.host import HostDriver

        return HostDriver(capacity_bytes)


class CudaPlugin:
    """Offers the `cuda` driver; CuPy and cuda-bindings are imported when it is asked for."""

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
    """Return the driver called `name`; `capacity_bytes` caps what it may hold (0: the device's own size).

    Raises ConfigError with the known names when no plugin answers, UnsupportedError when the device
    or a package it needs is missing.
    """
    hooks = (manager or plugin_manager()).hook.kvcached_driver
    driver: Driver | None = hooks(name=name, device_index=device_index, capacity_bytes=capacity_bytes)
    if driver is None:
        known = ", ".join(sorted(hook.plugin_name for hook in hooks.get_hookimpls()))
        raise ConfigError(f"driver {name!r} is not known: expected one of {known}")
    return driver
