"""The host driver under any legal order of calls, on real memory."""

from __future__ import annotations

import ctypes
import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from kvcached_core.driver.host import HostDriver
from kvcached_core.errors import CapacityError
from tests.core.test_driver_host import PAGE, backed_bytes


class HostMachine(RuleBasedStateMachine):
    """Calls verbs in any legal order and checks contents, free bytes and backed bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = HostDriver(16 * PAGE)
        self.base = self.driver.reserve(8 * PAGE)
        self.idle: list[int] = []
        self.mapped: dict[int, int] = {}

    @rule()
    def create(self) -> None:
        if len(self.idle) + len(self.mapped) == 16:
            with pytest.raises(CapacityError):
                self.driver.create(PAGE)
        else:
            self.idle.append(self.driver.create(PAGE))

    @precondition(lambda self: self.idle)
    @rule(data=st.data(), clean=st.booleans())
    def release(self, data: st.DataObject, clean: bool) -> None:
        handle = self.idle.pop(data.draw(st.integers(0, len(self.idle) - 1)))
        if clean:
            self.driver.clean(handle)
        self.driver.release(handle)

    @precondition(lambda self: self.idle)
    @rule(data=st.data(), slot=st.integers(0, 7), clean=st.booleans())
    def map(self, data: st.DataObject, slot: int, clean: bool) -> None:
        if slot in self.mapped:
            return
        handle = self.idle.pop(data.draw(st.integers(0, len(self.idle) - 1)))
        if clean:
            self.driver.clean(handle)
        address = self.base + slot * PAGE
        self.driver.map(address, PAGE, [handle])
        self.mapped[slot] = handle
        assert ctypes.string_at(address, PAGE) == bytes(PAGE)
        ctypes.memset(address, 1 + slot, PAGE)

    @precondition(lambda self: self.mapped)
    @rule(data=st.data())
    def unmap(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.mapped)))
        address = self.base + slot * PAGE
        assert ctypes.string_at(address, PAGE) == bytes([1 + slot]) * PAGE, "no other code wrote here"
        self.driver.unmap(address, PAGE)
        self.idle.append(self.mapped.pop(slot))

    @rule()
    def i1_bytes_add_up(self) -> None:
        held = (len(self.idle) + len(self.mapped)) * PAGE
        assert backed_bytes(self.driver) == held
        assert self.driver.memory().free_bytes == 16 * PAGE - held

    def teardown(self) -> None:
        watch = os.dup(self.driver._fd)
        self.driver.close()
        assert os.fstat(watch).st_blocks == 0, "I11"
        os.close(watch)
        self.driver.unreserve(self.base, 8 * PAGE)


HostMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


TestHostMachine = HostMachine.TestCase
