"""Rules for engines on one ledger: the model repeats each step of a worker or scheduler."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.errors import CapacityError
from kvcached_core.ledger import Runtime, SchedulerView
from kvcached_core.ledger.start_queue import Turn
from tests.ledger.helpers import CAPACITY, GRANULE, attach, die, engine_usage
from tests.ledger.world import HEADROOM, TOTAL, Party, World

GRANULES = st.integers(0, TOTAL)
SMALL = st.integers(0, 8)
WHO = st.integers(0, 63)
WEIGHTS = st.sampled_from([1, 50, 100, 300])
TICK_MS = 125  # an eighth of a second: exact in binary
_FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None
_STARTED_MS = 1_000_001


def some_live(machine: EngineRules) -> bool:
    return bool(machine.world.living)


def _someone_starts(machine: EngineRules) -> bool:
    return any(party.start for party in machine.world.living)


class EngineRules(RuleBasedStateMachine):
    """The steps of engines. They use the model's clock."""

    examples = 0

    @initialize()
    def start(self) -> None:
        type(self).examples += 1
        self.folder = tempfile.mkdtemp(prefix="kvcached-tests-", dir=_FOLDER)
        self.runtime = Runtime.open(Path(self.folder) / "r")
        self.world = World(now_ms=_STARTED_MS)
        self.number = 0

    def clock(self) -> float:
        return (self.world.now_ms - 1) / 1000

    def memory(self) -> MemoryInfo:
        return MemoryInfo(self.world.free * GRANULE, CAPACITY)

    def pick(self, who: int) -> Party:
        return self.world.living[who % len(self.world.living)]

    # -- engines come, hold, and go -----------------------------------------------------------------------

    @precondition(lambda self: len(self.world.living) < 6)
    @rule(limit=GRANULES | st.just(TOTAL), floor=SMALL | GRANULES, weight=WEIGHTS)
    def come(self, limit: int, floor: int, weight: int) -> None:
        self.number += 1
        instance = f"i{self.number}"
        fits = self.world.floors_but(None) + floor <= TOTAL
        self.world.sweep()
        try:
            account = attach(
                self.runtime, instance, name=instance, headroom_bytes=HEADROOM * GRANULE, weight=weight,
                limit_bytes=limit * GRANULE, floor_bytes=floor * GRANULE, clock=self.clock,
            )  # fmt: skip
        except CapacityError:
            assert not fits, "I3"
            return
        assert fits, "I3"
        view = SchedulerView.find(self.runtime, instance, 1, clock=self.clock)
        party = Party(account, view, limit, limit, floor, floor, weight, limit, weight_wanted=weight)
        self.world.parties.append(party)

    @precondition(lambda self: len(self.world.living) < 6)
    @rule(private=st.integers(0, TOTAL // 2), floor=SMALL, weight=WEIGHTS)
    def come_to_start(self, private: int, floor: int, weight: int) -> None:
        self.come(TOTAL, 0, weight)
        self.world.parties[-1].start = (private, floor)

    @precondition(_someone_starts)
    @rule(who=WHO)
    def ask_to_start(self, who: int) -> None:
        starters = [party for party in self.world.living if party.start]
        self._ask_to_start(starters[who % len(starters)])

    def _ask_to_start(self, party: Party) -> None:
        private, floor = party.start or (0, 0)
        expected = self.world.ask_to_start(party)
        try:
            turn = party.account.ask_to_start(private * GRANULE, floor * GRANULE, self.memory())
        except CapacityError:
            assert expected is None
            self._leave(party)
            return
        assert expected is not None
        admitted, ahead, missing = expected
        assert turn == Turn(admitted, ahead, missing * GRANULE, turn.free_bytes), (turn, expected)

    @precondition(some_live)
    @rule(who=WHO, want=GRANULES)
    def lease(self, who: int, want: int) -> None:
        self._lease(self.pick(who), want)

    def _lease(self, party: Party, want: int) -> None:
        if party.start:
            return
        if not want:
            party.demand, party.coming, party.is_short = 0, 0, False
            assert party.account.lease(0, self.memory()) == 0
            return
        expected = self.world.lease(party, want)
        assert party.account.lease(want * GRANULE, self.memory()) == expected * GRANULE
        # Unless outsiders took memory, all leases and private peaks fit at once.
        assert not expected or self.world.unleased >= 0, "I1"

    @precondition(some_live)
    @rule(who=WHO, count=GRANULES)
    def create(self, who: int, count: int) -> None:
        party = self.pick(who)
        count = min(count, party.leased - party.ready)
        made = min(count, max(0, self.world.free))
        party.account.created(made)
        party.ready += made
        party.created += made
        if made < count:
            party.account.give_back(bytes_never_ready=(count - made) * GRANULE)
            party.fall(count - made)

    @precondition(some_live)
    @rule(who=WHO, count=st.integers(1, TOTAL))
    def hold(self, who: int, count: int) -> None:
        self.lease(who, count)
        self.create(who, TOTAL)

    @precondition(some_live)
    @rule(who=WHO, count=GRANULES)
    def give_back(self, who: int, count: int) -> None:
        self._give_back(self.pick(who), count)

    def _give_back(self, party: Party, count: int) -> None:
        """Give back granules: leases without memory first, then memory that exists."""
        unready = min(count, party.leased - party.ready)
        released = min(count - unready, party.ready)
        party.account.give_back(unready * GRANULE, released)
        party.ready -= released
        party.mapped = min(party.mapped, party.ready)
        party.fall(unready + released)

    @precondition(some_live)
    @rule(who=WHO, mapped=GRANULES, now=st.integers(0, 4), peak=st.integers(0, 4))
    def publish(self, who: int, mapped: int, now: int, peak: int) -> None:
        party = self.pick(who)
        now = max(0, min(now, self.world.free + party.now))
        party.mapped, party.now, party.peak = min(mapped, party.ready), now, peak
        party.account.publish(party.mapped * GRANULE, now * GRANULE)
        party.account.set_private_peak(peak * GRANULE)

    @precondition(some_live)
    @rule(who=WHO)
    def die(self, who: int) -> None:
        self._drop(self.pick(who))

    @staticmethod
    def _drop(party: Party) -> None:
        die(party.account)
        party.view.close()
        party.alive = False

    @precondition(some_live)
    @rule(who=WHO)
    def leave(self, who: int) -> None:
        self._leave(self.pick(who))

    def _leave(self, party: Party) -> None:
        self._give_back(party, party.leased)
        party.view.close()
        party.account.detach()
        party.alive = False
        self.world.sweep()

    # -- their schedulers -----------------------------------------------------------------------------------

    @precondition(some_live)
    @rule(who=WHO, used=GRANULES, missing=SMALL, cached=GRANULES, spare=SMALL, busy=st.booleans())
    def schedule(self, who: int, used: int, missing: int, cached: int, spare: int, busy: bool) -> None:
        party = self.pick(who)
        party.used = min(used, party.leased)
        party.cached = min(cached, party.leased - party.used)
        party.needed = party.used + missing
        party.wanted = party.needed + cached + spare
        party.busy = busy
        party.idle_since_ms = 0 if busy else self.world.now_ms
        self._publish(party)

    @staticmethod
    def _publish(party: Party) -> None:
        assert party.view.created() == party.created
        assert party.view.granule_limit() == min(party.limit, party.limit_wanted)
        assert party.view.refused() == (party.demand > 0 and not party.coming)
        party.view.publish(
            engine_usage(
                4 * party.used, 4 * party.cached, 0, party.needed, party.wanted, party.created - party.ready
            )
        )
        party.view.count(0, 0, party.busy, party.idle_since_ms)

    @precondition(some_live)
    @rule(who=WHO, requests_end=st.booleans())
    def obey(self, who: int, requests_end: bool) -> None:
        self._obey(self.pick(who), requests_end)

    def _obey(self, party: Party, requests_end: bool) -> None:
        """Give memory that no request holds, down to the target; preempt requests down to `must`."""
        party.view.created()  # finds the slot again if its file was lost
        must, target = party.view.must_granules(), party.view.target_granules()
        asked = self.world.now_ms < party.asked_until_ms
        assert (target, must) == ((party.target, party.must) if asked else (0, 0))
        if must:
            party.used = min(party.used, must)
        if target and requests_end:
            party.used = min(party.used, target)
        if target and party.leased > max(target, party.used):
            self._give_back(party, party.leased - max(target, party.used))
        party.cached = min(party.cached, max(0, party.leased - party.used))
        self._publish(party)
