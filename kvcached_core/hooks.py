"""The hooks for plugins: drivers, the order of givers, and events. docs/hooks.md describes them."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from kvcached_core.driver.base import Driver
    from kvcached_core.events import Event
    from kvcached_core.ledger.policy.shares import Claim, Share

PROJECT = "kvcached"
ENTRY_POINT_GROUP = "kvcached.plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

# Named, not imported: this module is a low layer, and the plugins are loaded on first use.
BUILT_INS = {
    "host": "kvcached_core.driver.registry:HostPlugin",
    "cuda": "kvcached_core.driver.registry:CudaPlugin",
    "least-recently-busy": "kvcached_core.ledger.policy.arbiter:LeastRecentlyBusy",
}


class Specs:
    """The hooks; a plugin implements one or more. Register a driver's plugin under the driver's name."""

    @hookspec(firstresult=True)
    def kvcached_driver(self, name: str, device_index: int, capacity_bytes: int) -> Driver | None:
        """Return the driver called `name` for a device, or None if another plugin has it."""

    @hookspec(firstresult=True)
    def kvcached_givers(self, claims: Sequence[Claim], shares: Mapping[int, Share]) -> Sequence[int] | None:
        """Return the slots of the engines that give memory back, the first giver first.

        `claims` has the engines that hold more than their fair share. Called under the lock of the device's
        ledger, so return quickly. The shares decide how much each engine gives: none gives memory below
        its own share.
        """

    @hookspec
    def kvcached_event(self, event: Event) -> None:
        """Observe an event. Called on the thread where it happened, so return quickly. Do not wrap it."""


def new_plugin_manager() -> pluggy.PluginManager:
    """Return a manager with the hooks and the built-in plugins only."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Specs)
    for name, target in BUILT_INS.items():
        manager.register(pkgutil.resolve_name(target)(), name)
    return manager


@functools.cache
def plugin_manager() -> pluggy.PluginManager:
    """Return this process's manager, with the built-in plugins and those installed as entry points."""
    manager = new_plugin_manager()
    manager.load_setuptools_entrypoints(ENTRY_POINT_GROUP)
    return manager
