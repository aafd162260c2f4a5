"""Random histories of a ledger: engines, tools, deaths, outside processes, lost files, and time."""

from __future__ import annotations

import shutil
import sys

from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from kvcached_core.errors import CapacityError
from kvcached_core.ledger import check, set_floor, set_limit, set_weight, snapshot
from tests.ledger.engine_rules import GRANULES, SMALL, TICK_MS, WEIGHTS, WHO, EngineRules, some_live
from tests.ledger.helpers import GRANULE, HOST, files
from tests.ledger.world import TOTAL

SETTLING_TICKS = 48  # six seconds


class LedgerMachine(EngineRules):
    """Everything on one device, compared with the model after each step; at the end no engine starves."""

    steps = 0
    settled = 0

    @precondition(some_live)
    @rule(who=WHO, limit=GRANULES)
    def tool_sets_limit(self, who: int, limit: int) -> None:
        party = self.pick(who)
        (change,) = set_limit(self.runtime, party.account.name, limit * GRANULE)
        assert change.limit_bytes == limit * GRANULE
        party.limit_wanted = limit
        self.world.sweep()

    @precondition(some_live)
    @rule(who=WHO, below=st.integers(1, 8), back=st.integers(0, 4))
    def tool_squeezes(self, who: int, below: int, back: int) -> None:
        self.tool_sets_limit(who, max(0, self.pick(who).leased - below))
        self.acknowledge(who)
        self.give_back(who, back)

    @precondition(some_live)
    @rule(who=WHO, floor=SMALL | GRANULES)
    def tool_sets_floor(self, who: int, floor: int) -> None:
        party = self.pick(who)
        fits = self.world.floors_but(party) + floor <= TOTAL
        self.world.sweep()
        try:
            set_floor(self.runtime, party.account.name, floor * GRANULE)
        except CapacityError:
            assert not fits, "I3"
        else:
            assert fits, "I3"
            party.floor_wanted = floor

    @precondition(some_live)
    @rule(who=WHO, weight=WEIGHTS)
    def tool_sets_weight(self, who: int, weight: int) -> None:
        party = self.pick(who)
        set_weight(self.runtime, party.account.name, weight)
        party.weight_wanted = weight
        self.world.sweep()

    @precondition(some_live)
    @rule(who=WHO)
    def acknowledge(self, who: int) -> None:
        party = self.pick(who)
        party.account.acknowledge()
        party.apply_controls()

    @rule(count=st.integers(0, TOTAL // 2))
    def outsider(self, count: int) -> None:
        self.world.outside = max(0, min(count, self.world.free + self.world.outside))

    @rule(ticks=st.sampled_from([1, 2, 8, 9]))
    def time_passes(self, ticks: int) -> None:
        self.world.now_ms += ticks * TICK_MS

    @precondition(some_live)
    @rule(who=WHO, which=st.sampled_from(["ledger", "lock", "everything", "slot-00.owner", "slot-01.worker"]))
    def files_vanish(self, who: int, which: str) -> None:
        """No engine is granted memory until every living engine has written its slot again."""
        living = self.world.living
        for party in living:  # else a value that a tool has just set is lost with the file
            party.account.acknowledge()
            party.apply_controls()
        folder = self.runtime.device(HOST.uuid)
        if which == "everything":
            shutil.rmtree(folder.path)
        else:
            (folder.path / which).unlink(missing_ok=True)
        lost = which in ("everything", "ledger")
        if lost:
            self.world.sweep()
        retaking = [party for party in living if lost or which.startswith(f"slot-{party.slot:02d}")]
        first = self.pick(who)
        if which in ("lock", "ledger", "slot-01.worker") and not first.start:
            if first in retaking:
                first.retake()
                retaking.remove(first)
            if which == "ledger" and len(living) > 1:
                assert first.account.lease(GRANULE, self.memory()) == 0, "others hold what is not to be seen"
                first.demand, first.coming, first.is_short = 1, 0, True
            else:
                self._lease(first, 5)
        for party in living * 2:
            party.account.acknowledge()
        for party in retaking:
            party.retake()

    @invariant()
    def i1_to_i4_hold_and_the_words_are_those_of_the_model(self) -> None:
        type(self).steps += 1
        shown = {}
        for device in snapshot(self.runtime):
            assert check(device) == []
            shown = {owner.instance: owner for owner in device.owners}
        parties = {party.account._membership.texts["instance"]: party for party in self.world.parties}
        assert shown.keys() == parties.keys(), "I4"
        for instance, party in parties.items():
            owner = shown[instance]
            assert owner.live == party.alive, "I4"
            if party.alive:
                party.account.check()
            for name in ("leased", "ready", "mapped", "ceiling", "demand", "coming", "starting", "reclaim",
                         "target", "must", "needed", "wanted", "used", "cached"):  # fmt: skip
                assert getattr(owner, f"{name}_bytes") == getattr(party, name) * GRANULE, name
            for name in ("limit", "floor"):
                assert getattr(owner, f"{name}_applied") == getattr(party, name) * GRANULE, name
            for name in ("short_at_ms", "kept_until_ms", "asked_until_ms", "queued_at_ms", "reclaims",
                         "weight_wanted", "idle_since_ms"):  # fmt: skip
                assert getattr(owner, name) == getattr(party, name), name
            assert party.leased <= party.ceiling, "I2"
        assert sum(party.ready + party.now for party in self.world.living) + self.world.outside <= TOTAL, "I1"

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            if sys.exc_info()[0]:  # a step has failed: later checks would only hide the failure
                return
            self.settle()
            self.i1_to_i4_hold_and_the_words_are_those_of_the_model()
            last = self.world.living
            for party in last:
                self._leave(party)
            if last and self.runtime.device(HOST.uuid).path.exists():
                assert files(self.runtime) <= {"ledger", "lock"}, "I11"
        finally:
            for party in self.world.living:
                self._drop(party)
            shutil.rmtree(self.folder)

    def settle(self) -> None:
        """Stop all changes: after a bounded time every engine has its share."""
        type(self).settled += 1
        for party in self.world.living:
            party.account.acknowledge()
            party.apply_controls()
        for _ in range(SETTLING_TICKS):
            self.world.now_ms += TICK_MS
            for party in self.world.living:
                if party.start:
                    self._ask_to_start(party)
                else:
                    if party.leased < party.goal:  # an engine that asks has requests
                        party.busy, party.idle_since_ms = True, 0
                        self._publish(party)
                    self._lease(party, max(0, party.goal - party.leased))
                    self.create(self.world.living.index(party), TOTAL)
            for party in self.world.living:
                self._obey(party, requests_end=True)
        self._nobody_starves()

    def _nobody_starves(self) -> None:
        claims = self.world.claims()
        unleased = self.world.unleased
        of = self.world.entitled(claims, unleased)
        # The granule with block 0 is never given (I7), so an engine may hold one granule above its share.
        stuck = sum(claim.leased > int(of[claim.slot][2]) for claim in claims if claim.leased == 1)
        waits = [party for party in self.world.living if party.start or party.leased < party.goal]
        for party in self.world.living:
            if not party.start:
                assert party.leased >= min(party.goal, int(of[party.slot][2]) - stuck), "starved"
        starters = sorted((p.queued_at_ms, p.slot, p) for p in waits if p.start)
        if starters:
            private, floor = starters[0][2].start or (0, 0)
            assert private + floor > unleased, "the first in the queue is kept waiting with room for it"
            assert all(claim.leased <= max(1, int(of[claim.slot][2])) for claim in claims), "kept from it"
        elif waits:
            assert unleased <= 0, "I10: somebody waits while memory is free"
