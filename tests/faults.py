"""A driver whose calls fail when a test says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, cast

from kvcached_core.driver.base import Driver
from kvcached_core.errors import KVCachedError

VERBS = frozenset(
    {
        *("identity", "memory", "reserve", "unreserve", "create", "clean", "release", "map", "alias"),
        *("unmap", "tensor", "record", "passed", "own_stream", "follow", "synchronize", "close"),
    }
)


class FaultyDriver:
    """Passes calls on to `inner`, but the n-th call of `verb` (None: of any method) fails, once or for good.

    The failing call does not reach `inner`. `calls` counts all calls, `injected` those that failed.
    """

    def __init__(
        self,
        inner: Driver,
        verb: str | None = None,
        nth: int = 0,
        forever: bool = False,
        error: Callable[[], KVCachedError] | None = None,
    ) -> None:
        assert verb is None or verb in VERBS, verb
        self.inner = inner
        self.verb, self.nth, self.forever, self.error = verb, nth, forever, error
        self.calls: Counter[str] = Counter()
        self.injected = 0

    @property
    def driver(self) -> Driver:
        """Return self, typed as a Driver."""
        return cast(Driver, self)

    def heal(self) -> None:
        """Inject no more failures."""
        self.nth = 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if name not in VERBS:
            return value

        def verb(*arguments: Any, **options: Any) -> Any:
            self._count(name)
            return value(*arguments, **options)

        return verb

    def _count(self, name: str) -> None:
        self.calls[name] += 1
        number = self.calls.total() if self.verb is None else self.calls[name]
        if not self.nth or self.error is None or self.verb not in (None, name):
            return
        if number == self.nth or (self.forever and number > self.nth):
            self.injected += 1
            raise self.error()
