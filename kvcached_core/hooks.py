"""Where plugins attach: drivers and observers of events."""

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

# Named, not imported: this module is the lowest layer, and a driver is loaded when somebody asks for it.
BUILT_INS = {
    "host": "kvcached_core.driver.registry:HostPlugin",
    "cuda": "kvcached_core.driver.registry:CudaPlugin",
    "least-recently-busy": "kvcached_core.ledger.policy.arbiter:LeastRecentlyBusy",
}


class Specs:
    """The hooks; a plugin implements those it wants. A driver's plugin is registered under its name."""

    @hookspec(firstresult=True)
    def kvcached_driver(self, name: str, device_index: int, capacity_bytes: int) -> Driver | None:
        """Return the driver called `name` on a device, or None if it is another's to return."""

    @hookspec(firstresult=True)
    def kvcached_givers(self, claims: Sequence[Claim], shares: Mapping[int, Share]) -> Sequence[int] | None:
        """Return the slots of those who hold more than they are entitled to, who gives first in front.

        Called under the ledger's lock of a device that has not enough for all: be quick. How much each
        gives is not the policy's: nobody is asked below its share, and floors hold whatever it says.
        """

    @hookspec
    def kvcached_event(self, event: Event) -> None:
        """Take note of an event; called on the thread where it happened, so be quick, and do not wrap."""


def new_plugin_manager() -> pluggy.PluginManager:
    """Return a manager that knows the hooks and the built-in plugins, and nobody else's."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Specs)
    for name, target in BUILT_INS.items():
        manager.register(pkgutil.resolve_name(target)(), name)
    return manager


@functools.cache
def plugin_manager() -> pluggy.PluginManager:
    """Return the process's manager, with the plugins that are installed as entry points."""
    manager = new_plugin_manager()
    manager.load_setuptools_entrypoints(ENTRY_POINT_GROUP)
    return manager
