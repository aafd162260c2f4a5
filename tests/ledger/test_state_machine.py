"""The ledger against a plain model: owners, tools, outsiders that take memory, files that vanish."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.errors import CapacityError
from kvcached_core.ledger import Account, Desk, Runtime, check, set_floor, set_limit, snapshot
from tests.ledger.helpers import CAPACITY, GRANULE, HOST, Usage, attach, die, files
from tests.report import record

TOTAL = CAPACITY // GRANULE
HEADROOM = 2
GRANULES = st.integers(0, TOTAL)
WHO = st.integers(0, 63)


@dataclass
class Owner:
    """What the model knows of one account; everything in granules."""

    account: Account
    limit: int
    limit_wanted: int
    floor: int
    floor_wanted: int
    ceiling: int
    leased: int = 0
    ready: int = 0
    mapped: int = 0
    created: int = 0
    demand: int = 0
    now: int = 0
    peak: int = 0


class LedgerMachine(RuleBasedStateMachine):
    """Owners by instance id; `outside` is what processes that the ledger does not know have taken."""

    steps = 0
    examples = 0

    @initialize()
    def start(self) -> None:
        type(self).examples += 1
        self.folder = tempfile.mkdtemp(prefix="kvcached-tests-")
        self.runtime = Runtime.open(Path(self.folder) / "r")
        self.owners: dict[str, Owner] = {}
        self.outside = 0
        self.number = 0

    @property
    def free(self) -> int:
        taken = sum(owner.ready + owner.now for owner in self.owners.values())
        return TOTAL - taken - self.outside

    def pick(self, who: int) -> Owner:
        return list(self.owners.values())[who % len(self.owners)]

    def some(self) -> bool:
        return bool(self.owners)

    @precondition(lambda self: len(self.owners) < 6)
    @rule(limit=GRANULES, floor=st.integers(0, TOTAL // 2))
    def come(self, limit: int, floor: int) -> None:
        self.number += 1
        instance = f"i{self.number}"
        floors = sum(max(owner.floor, owner.floor_wanted) for owner in self.owners.values())
        fits = floors + floor <= TOTAL
        try:
            account = attach(
                self.runtime, instance, name=instance, headroom_bytes=HEADROOM * GRANULE,
                limit_bytes=limit * GRANULE, floor_bytes=floor * GRANULE,
            )  # fmt: skip
        except CapacityError:
            assert not fits
            return
        assert fits
        self.owners[instance] = Owner(account, limit, limit, floor, floor, limit)

    def room(self, owner: Owner) -> int:
        """Return what the design says: the least of limit, device and free memory not yet promised."""
        everybody = self.owners.values()
        leased = sum(other.leased for other in everybody)
        unkept = sum(other.leased - other.ready for other in everybody)
        private = sum(max(0, other.peak - other.now) for other in everybody)
        return min(
            owner.limit_wanted - owner.leased,
            TOTAL - HEADROOM - leased,
            self.free - unkept - private - HEADROOM,
        )

    @precondition(some)
    @rule(who=WHO, want=st.integers(1, TOTAL))
    def lease(self, who: int, want: int) -> None:
        owner = self.pick(who)
        expected = max(0, min(want, self.room(owner)))
        got = owner.account.lease(want * GRANULE, MemoryInfo(max(0, self.free) * GRANULE, CAPACITY))
        assert got == expected * GRANULE, "I10: all that there is room for, and no more"
        self.apply(owner)
        owner.leased += expected
        owner.demand = want - expected

    def apply(self, owner: Owner) -> None:
        if owner.limit != owner.limit_wanted or owner.account.limit_bytes != owner.limit * GRANULE:
            owner.ceiling = max(owner.limit_wanted, owner.leased)
        owner.limit, owner.floor = owner.limit_wanted, owner.floor_wanted

    @precondition(some)
    @rule(who=WHO, count=GRANULES)
    def create(self, who: int, count: int) -> None:
        owner = self.pick(who)
        count = min(count, owner.leased - owner.ready)
        made = min(count, max(0, self.free))
        owner.account.created(made)
        owner.ready += made
        owner.created += made
        if made < count:
            owner.account.give_back(bytes_never_ready=(count - made) * GRANULE)
            self.fall(owner, count - made)

    def fall(self, owner: Owner, granules: int) -> None:
        owner.leased -= granules
        owner.ceiling = max(owner.limit, min(owner.ceiling, owner.leased))

    @precondition(some)
    @rule(who=WHO, count=GRANULES)
    def give_back(self, who: int, count: int) -> None:
        owner = self.pick(who)
        count = min(count, owner.ready)
        owner.account.give_back(granules_released=count)
        owner.ready -= count
        owner.mapped = min(owner.mapped, owner.ready)
        self.fall(owner, count)

    @precondition(some)
    @rule(who=WHO, mapped=GRANULES, now=st.integers(0, 4), peak=st.integers(0, 4))
    def publish(self, who: int, mapped: int, now: int, peak: int) -> None:
        owner = self.pick(who)
        now = max(0, min(now, self.free + owner.now))
        owner.mapped, owner.now, owner.peak = min(mapped, owner.ready), now, peak
        owner.account.publish(owner.mapped * GRANULE, now * GRANULE)
        owner.account.set_private_peak(peak * GRANULE)

    @rule(count=st.integers(0, TOTAL // 2))
    def outsider(self, count: int) -> None:
        self.outside = min(count, self.free + self.outside)

    @precondition(some)
    @rule(who=WHO, limit=GRANULES)
    def tool_sets_limit(self, who: int, limit: int) -> None:
        owner = self.pick(who)
        (change,) = set_limit(self.runtime, owner.account.name, limit * GRANULE)
        assert change.limit_bytes == limit * GRANULE
        owner.limit_wanted = limit

    @precondition(some)
    @rule(who=WHO, count=st.integers(1, TOTAL))
    def hold(self, who: int, count: int) -> None:
        self.lease(who, count)
        self.create(who, count)

    @precondition(some)
    @rule(who=WHO, below=st.integers(1, 8), back=st.integers(0, 4))
    def tool_squeezes(self, who: int, below: int, back: int) -> None:
        self.tool_sets_limit(who, max(0, self.pick(who).leased - below))
        self.acknowledge(who)
        self.give_back(who, back)

    @precondition(some)
    @rule(who=WHO, floor=GRANULES)
    def tool_sets_floor(self, who: int, floor: int) -> None:
        owner = self.pick(who)
        others = sum(max(o.floor, o.floor_wanted) for o in self.owners.values() if o is not owner)
        try:
            set_floor(self.runtime, owner.account.name, floor * GRANULE)
        except CapacityError:
            assert others + floor > TOTAL
        else:
            assert others + floor <= TOTAL
            owner.floor_wanted = floor

    @precondition(some)
    @rule(who=WHO)
    def acknowledge(self, who: int) -> None:
        owner = self.pick(who)
        owner.account.acknowledge()
        self.apply(owner)
        assert owner.account.limit_bytes == owner.limit * GRANULE

    @precondition(some)
    @rule(who=WHO, wanted=GRANULES)
    def schedule(self, who: int, wanted: int) -> None:
        owner = self.pick(who)
        desk = Desk.find(self.runtime, owner.account._texts["instance"], 1)
        assert desk.created() == owner.created
        assert desk.granule_limit() == min(owner.limit, owner.limit_wanted)
        assert desk.refused() == (owner.demand > 0)
        desk.publish(Usage(wanted_granules=wanted))
        desk.close()
        assert owner.account.wanted_bytes == wanted * GRANULE

    @precondition(some)
    @rule(who=WHO)
    def die(self, who: int) -> None:
        owner = self.pick(who)
        die(owner.account)
        del self.owners[owner.account._texts["instance"]]

    @precondition(some)
    @rule(who=WHO)
    def leave(self, who: int) -> None:
        owner = self.pick(who)
        unready = owner.leased - owner.ready
        owner.account.give_back(unready * GRANULE, owner.ready)
        owner.account.detach()
        del self.owners[owner.account._texts["instance"]]

    @precondition(some)
    @rule(who=WHO, which=st.sampled_from(["ledger", "lock", "everything", "slot-00.owner", "slot-01.worker"]))
    def files_vanish(self, who: int, which: str) -> None:
        """Nobody gets anything until all who live have written their part again."""
        for owner in self.owners.values():
            owner.account.acknowledge()  # what tools set just before is lost with the file
            self.apply(owner)
        folder = self.runtime.device(HOST.uuid)
        if which == "everything":
            shutil.rmtree(folder.path)
        else:
            (folder.path / which).unlink(missing_ok=True)
        first = self.pick(who)
        want = max(1, self.room(first) + 1)
        expected = 0 if which == "ledger" and len(self.owners) > 1 else max(0, self.room(first))
        if which not in ("everything", "slot-00.owner"):
            got = first.account.lease(want * GRANULE, MemoryInfo(max(0, self.free) * GRANULE, CAPACITY))
            assert got == expected * GRANULE
            first.leased, first.demand = first.leased + expected, want - expected
        for owner in self.owners.values():
            owner.account.acknowledge()
            owner.account.acknowledge()

    @invariant()
    def i1_to_i4_hold_and_the_numbers_are_those_of_the_model(self) -> None:
        type(self).steps += 1
        seen = {}
        for device in snapshot(self.runtime):
            assert check(device) == []
            seen = {owner.instance: owner for owner in device.owners if owner.live}
            dead = [owner for owner in device.owners if not owner.live]
            assert all(owner.instance not in self.owners for owner in dead), "I4"
        assert seen.keys() == self.owners.keys(), "I4"
        for instance, owner in self.owners.items():
            owner.account.check()
            shown = seen[instance]
            assert (shown.leased_bytes, shown.ready_bytes) == (owner.leased * GRANULE, owner.ready * GRANULE)
            assert (shown.mapped_bytes, shown.demand_bytes) == (
                owner.mapped * GRANULE,
                owner.demand * GRANULE,
            )
            assert (shown.limit_applied, shown.floor_applied) == (
                owner.limit * GRANULE,
                owner.floor * GRANULE,
            )
            assert shown.ceiling_bytes == owner.ceiling * GRANULE, "I2: above the limit it only falls"
            assert owner.leased <= owner.ceiling

    def teardown(self) -> None:
        if not hasattr(self, "owners"):
            return
        for owner in list(self.owners.values()):
            owner.account.give_back((owner.leased - owner.ready) * GRANULE, owner.ready)
            owner.account.detach()
        if self.runtime.device(HOST.uuid).path.exists() and self.owners:
            assert files(self.runtime) <= {"ledger", "lock"}, "I11"
        shutil.rmtree(self.folder)


def test_i1_to_i11_hold_after_every_step_of_any_history() -> None:
    quiet = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)
    run_state_machine_as_test(
        LedgerMachine, settings=settings(quiet, max_examples=150, stateful_step_count=50)
    )
    record("ledger.steps", LedgerMachine.steps)
    record("ledger.examples", LedgerMachine.examples)
    assert LedgerMachine.steps > LedgerMachine.examples
