"""Events: what happens to the memory of a device, told to whoever observes it.

`device`, `name` and `slot` are those of the engine it happened to; what is named _bytes is of one rank.

| kind | what happened | data besides |
|---|---|---|
| start | an engine was admitted | waited_seconds, starting_bytes |
| lease | memory was promised | granted_bytes, leased_bytes |
| ready | handles exist for all that is promised; `granules` were ever created | granules, ready_bytes |
| demand | a lease got less than it wanted | unmet_bytes, leased_bytes |
| reclaim | it is asked to hold less, for the engine `taker`; 0 is not asked | target_bytes, must_bytes, leased_bytes, taker |
| evict | it gave up granules, and the cached blocks in them | granules, blocks |
| preempt | it preempted requests, to give back a floor | requests, must_bytes |
| limit | a limit, floor or weight that was set is gone by | limit_bytes, floor_bytes, weight |
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
    """One event: `at_seconds` on the monotonic clock, `wall_seconds` since the epoch, `data` by `kind`."""

    kind: Kind
    at_seconds: float
    wall_seconds: float
    data: Mapping[str, Value]


def happened(kind: Kind, data: Mapping[str, Value]) -> Event:
    """Return an event of now."""
    return Event(kind, time.monotonic(), time.time(), data)


class Observers:
    """Who implements the hook `kvcached_event`. What goes wrong in one is logged once and reaches nobody."""

    def __init__(self, manager_of: Callable[[], pluggy.PluginManager] = plugin_manager) -> None:
        self._manager_of = manager_of
        self._hook: pluggy.HookCaller | None = None
        self._mutex = threading.Lock()
        self._failed: set[pluggy.HookImpl] = set()

    def present(self) -> bool:
        """Say whether anybody observes. The first call loads the plugins: tens of milliseconds."""
        return bool(self._implementations())

    def tell(self, event: Event) -> None:
        """Call every observer, the one registered last first."""
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
            _log.exception("an installed plugin cannot be loaded: nobody observes events")
            return new_plugin_manager()

    def _log_once(self, observer: pluggy.HookImpl) -> None:
        with self._mutex:
            if observer in self._failed:
                return
            self._failed.add(observer)
        _log.exception("observer %s failed; further failures of it are not logged", observer.plugin_name)


OBSERVERS = Observers()
