"""Events reach every observer, and an observer's error never reaches the code that reports the event."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pluggy
import pytest

from kvcached_core import events
from kvcached_core.events import OBSERVERS, Event, Observers, happened
from kvcached_core.hooks import hookimpl, new_plugin_manager, plugin_manager


class Observer:
    """An observer that keeps every event."""

    def __init__(self) -> None:
        self.seen: list[Event] = []

    @hookimpl
    def kvcached_event(self, event: Event) -> None:
        self.seen.append(event)


class Broken(Observer):
    @hookimpl
    def kvcached_event(self, event: Event) -> None:
        super().kvcached_event(event)
        raise OSError(f"no network, {len(self.seen)}")


class Wrapper:
    @hookimpl(wrapper=True)
    def kvcached_event(self) -> Iterator[None]:
        raise AssertionError("a wrapper would hold up the others")
        yield


class Counter:
    """An observer that only counts events."""

    count = 0

    @hookimpl
    def kvcached_event(self) -> None:
        self.count += 1


def observers(*plugins: object) -> Observers:
    manager = new_plugin_manager()
    for plugin in plugins:
        manager.register(plugin)
    return Observers(lambda: manager)


def test_nobody_observes_with_the_built_in_plugins_only() -> None:
    assert not observers().present()
    observers().tell(happened("lease", {}))
    assert observers(Observer()).present()


def test_one_that_fails_keeps_an_event_from_nobody_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, broken, last = Observer(), Broken(), Observer()
    told = observers(first, broken, last)
    happening = [happened("ready", {"granules": n}) for n in range(3)]
    with caplog.at_level(logging.ERROR):
        for event in happening:
            told.tell(event)
    assert first.seen == broken.seen == last.seen == happening
    (record,) = caplog.records
    assert record.exc_info and str(record.exc_info[1]) == "no network, 1"


def test_each_that_fails_is_logged_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    told = observers(Broken(), Broken(), Wrapper())
    for _ in range(2):
        told.tell(happened("demand", {}))
    assert len(caplog.records) == 3


def test_an_observer_may_take_no_argument() -> None:
    counter = Counter()
    observers(counter).tell(happened("start", {}))
    assert counter.count == 1


def test_a_plugin_that_cannot_be_loaded_costs_the_events_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tries: list[int] = []

    def load() -> pluggy.PluginManager:
        tries.append(1)
        raise ImportError("it needs something else")

    told = Observers(load)
    assert not told.present() and not told.present()
    told.tell(happened("lease", {}))
    assert tries == [1] and len(caplog.records) == 1


def test_an_event_reaches_a_plugin_of_the_process_for_as_long_as_it_is_registered() -> None:
    observer = Observer()
    OBSERVERS.tell(happened("evict", {"granules": 1}))
    plugin_manager().register(observer)
    try:
        OBSERVERS.tell(happened("evict", {"granules": 2, "blocks": 8}))
    finally:
        plugin_manager().unregister(observer)
    OBSERVERS.tell(happened("evict", {"granules": 3}))
    (event,) = observer.seen
    assert (event.kind, event.data) == ("evict", {"granules": 2, "blocks": 8})
    later = happened("evict", {})
    assert 0 <= later.at_seconds - event.at_seconds < 60
    assert 0 <= later.wall_seconds - event.wall_seconds < 60


def test_the_table_tells_of_every_kind_and_of_no_other() -> None:
    assert events.__doc__ is not None
    rows = re.findall(r"^\| (\w+) \| [^|]+ \| ([a-z_, ]+) \|$", events.__doc__, re.MULTILINE)
    assert {kind for kind, _ in rows} - {"kind"} == events.KINDS
