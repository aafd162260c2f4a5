"""Events: changes to the memory of a device, reported to observers.

Every event has `device`, `name` and `slot` of the engine it happened to. Fields in _bytes are of one rank.

| kind | it happened that | data besides |
|---|---|---|
| start | an engine was admitted | waited_seconds, starting_bytes |
| lease | the ledger leased memory to an engine | granted_bytes, leased_bytes |
| ready | handles exist for all leased memory; `granules` were ever created | granules, ready_bytes |
| demand | a lease got less than the engine wants | unmet_bytes, leased_bytes |
| reclaim | the engine was asked to hold less, for the engine `taker`; 0: not asked | target_bytes, must_bytes, leased_bytes, taker |
| evict | the engine gave up granules that had cached blocks | granules, blocks |
| preempt | the engine preempted requests for another engine's floor | requests, must_bytes |
| limit | the engine obeys a new limit, floor or weight | limit_bytes, floor_bytes, weight |
| outside | processes that the ledger does not know took or freed memory | outside_bytes, free_bytes |
"""  # noqa: E501

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import pluggy

from kvcached_core.hooks import new_plugin_manager, plugin_manager

Kind = Literal["start", "lease", "ready", "demand", "reclaim", "evict", "preempt", "limit", "outside"]
Value = str | int | float | bool
KINDS: frozenset[str] = frozenset(get_args(Kind))

_log = logging.getLogger(__name__)


class Event(NamedTuple):
    """One event: `at_seconds` on the monotonic clock, `wall_seconds` since the epoch, `data` of its kind."""

    kind: Kind
    at_seconds: float
    wall_seconds: float
    data: Mapping[str, Value]


def happened(kind: Kind, data: Mapping[str, Value]) -> Event:
    """Return an event that happens now."""
    return Event(kind, time.monotonic(), time.time(), data)


class Observers:
    """Calls the plugins with the hook `kvcached_event`. The first error of each is logged; none is raised."""

    def __init__(self, manager_of: Callable[[], pluggy.PluginManager] = plugin_manager) -> None:
        self._manager_of = manager_of
        self._hook: pluggy.HookCaller | None = None
        self._mutex = threading.Lock()
        self._failed: set[pluggy.HookImpl] = set()

    def present(self) -> bool:
        """Say whether any plugin observes events. The first call loads the plugins: tens of milliseconds."""
        return bool(self._implementations())

    def tell(self, event: Event) -> None:
        """Call every observer with the event, the one registered last first."""
        for observer in reversed(self._implementations()):
            try:
                if observer.wrapper or observer.hookwrapper:
                    raise TypeError("an observer cannot be a hook wrapper")
                observer.function(*(event for _ in observer.argnames))
            except Exception:
                self._log_once(observer)

    def _implementations(self) -> Sequence[pluggy.HookImpl]:
        if self._hook is None:
            self._hook = self._find().hook.kvcached_event
        return self._hook.get_hookimpls()

    def _find(self) -> pluggy.PluginManager:
        try:
            return self._manager_of()
        except Exception:
            _log.exception("an installed plugin cannot be loaded: no plugin observes events")
            return new_plugin_manager()

    def _log_once(self, observer: pluggy.HookImpl) -> None:
        with self._mutex:
            if observer in self._failed:
                return
            self._failed.add(observer)
        _log.exception("observer %s failed; further failures of it are not logged", observer.plugin_name)


OBSERVERS = Observers()
