"""Random histories of an engine on two nodes: late or lost messages, growth, frees, sleep, lost files."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
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

from devkit.report import record
from kvcached_core.ledger import set_limit
from kvcached_core.ledger.file.layout import ENGINE_WORDS
from tests.ledger.helpers import ATTACHED, CAPACITY, GRANULE, HOST, PLENTY, die, engine_usage, hold
from tests.ledger.links import TwoNodes

TOTAL = CAPACITY // GRANULE
RANKS = st.integers(0, 1)
FEW = st.integers(1, 6)
RARELY = st.sampled_from([True, *[False] * 5])


class LinkMachine(RuleBasedStateMachine):
    """The scheduler never counts on a granule that a rank does not have, or was ordered to free (I5)."""

    steps = 0
    withdrawn = 0
    too_low = 0

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvt-link-"))
        self.now = 100.0
        self.nodes = TwoNodes(self.folder, lambda: self.now)
        self.released = 0  # ordered by the scheduler so far
        self.plans: list[list[int]] = [[], []]  # sent to each rank and not carried out yet
        self.ordered = [0, 0]
        for account in self.nodes.accounts:
            hold(account, 1)

    def created(self, rank: int) -> int:
        return self.nodes.accounts[rank]._own["created_granules"]

    def freed(self, rank: int) -> int:
        return self.nodes.accounts[rank]._own["released_granules"]

    # -- workers -----------------------------------------------------------------------------------------

    @rule(rank=RANKS, count=FEW)
    def grow(self, rank: int, count: int) -> None:
        account = self.nodes.accounts[rank]
        count = min(count, TOTAL - account.leased_bytes // GRANULE)
        if count and not account.created_most:  # as HandleGrowth.grow does
            account.created(account.lease(count * GRANULE, PLENTY) // GRANULE)

    @rule(rank=RANKS, count=st.integers(0, 12))
    def give_back(self, rank: int, count: int) -> None:
        """Carry out the next plan: free granules that the plans released, then surplus above the cap."""
        if self.plans[rank]:
            self.ordered[rank] = max(self.ordered[rank], self.plans[rank].pop(0))
        account, owed = self.nodes.accounts[rank], self.ordered[rank] - self.freed(rank)
        freed = min(count, owed)
        account.give_back(granules_released=freed)
        most = account.created_most
        surplus = max(0, self.created(rank) - max(most, self.freed(rank) + 1)) if most else 0
        if freed == owed:
            account.give_back(granules_withdrawn=min(count - freed, surplus))
            type(self).withdrawn += min(count - freed, surplus)

    @rule(rarely=RARELY)
    def sleep(self, rarely: bool) -> None:
        """Let every rank give back all but one granule without a plan, and set equal counts."""
        if not rarely:
            return
        for plans in self.plans:
            plans.clear()
        created = max(self.created(0), self.created(1)) + 1
        for rank, account in enumerate(self.nodes.accounts):
            account.give_back(granules_released=self.created(rank) - self.freed(rank) - 1)
            account.recount(created - self.created(rank))
            self.ordered[rank] = self.freed(rank)

    # -- other engines, tools and time -------------------------------------------------------------------

    @rule(rank=RANKS, granules=st.integers(0, 12), seconds=st.sampled_from([0.0, 1.0]))
    def ask_for_memory(self, rank: int, granules: int, seconds: float) -> None:
        account = self.nodes.accounts[rank]
        until_ms = int((self.nodes.clocks[rank]() + seconds) * 1000)
        account._slot.set("target_bytes", granules * GRANULE)
        account._slot.set("asked_until_ms", until_ms if granules else 0)

    @rule(rank=RANKS, limit=st.integers(1, TOTAL))
    def limit(self, rank: int, limit: int) -> None:
        set_limit(self.nodes.runtimes[rank], "m", limit * GRANULE)
        self.nodes.accounts[rank].acknowledge()

    @rule(rank=RANKS, rarely=RARELY)
    def lose_the_ledger(self, rank: int, rarely: bool) -> None:
        if not rarely:
            return
        shutil.rmtree(self.nodes.runtimes[rank].device(HOST.uuid).path)
        self.nodes.accounts[rank].acknowledge()

    @rule(seconds=st.sampled_from([0.02, 0.5, 2.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    # -- the link ----------------------------------------------------------------------------------------

    @rule()
    def agent_reports(self) -> None:
        self.nodes.agent.report_changes()

    @rule()
    def all_is_sent(self) -> None:
        self.nodes.exchange()

    @rule()
    def scheduler_tells(self) -> None:
        self.nodes.down.messages.append(self.nodes.link.next_update())

    @precondition(lambda self: self.nodes.up.messages)
    @rule(lost=st.integers(0, 2))
    def scheduler_receives(self, lost: int) -> None:
        messages = self.nodes.up.messages
        for _ in range(min(lost, len(messages) - 1)):
            messages.popleft()
        self.nodes.link.handle(messages.popleft())

    @precondition(lambda self: self.nodes.down.messages)
    @rule(lost=st.integers(0, 2))
    def agent_receives(self, lost: int) -> None:
        messages = self.nodes.down.messages
        for _ in range(min(lost, len(messages) - 1)):
            messages.popleft()
        self.nodes.agent.handle(messages.popleft())

    @rule(rarely=RARELY)
    def agent_begins_anew(self, rarely: bool) -> None:
        if not rarely:
            return
        for slot in self.nodes.agent._slots:
            slot.close()
        self.nodes.agent = self.nodes.new_agent()

    # -- the scheduler -----------------------------------------------------------------------------------

    def held(self) -> int:
        """Read the ledger as the governor does before each step; return the granules held."""
        view = self.nodes.view
        self.released = max(self.released, view.released())  # the ranks may have slept
        view.granule_limit()
        view.target_granules()
        return view.created() - self.released

    @rule(wanted=FEW, give=st.integers(0, 6))
    def step(self, wanted: int, give: int) -> None:
        give = max(0, min(give, self.held() - 1))
        self.released += give
        if give:
            for plans in self.plans:
                plans.append(self.released)
        self.nodes.view.publish(engine_usage(wanted_granules=wanted, released_granules=self.released))

    @invariant()
    def i5_what_the_scheduler_counts_on_is_there_on_every_rank(self) -> None:
        type(self).steps += 1
        before = self.nodes.view._created
        held = self.held()
        assert self.nodes.view._created >= before, "it never falls"
        for rank in (0, 1):
            assert self.nodes.view._created <= self.created(rank), rank
            assert held <= self.created(rank) - self.freed(rank), rank
            self.nodes.accounts[rank].check()
        type(self).too_low += self.nodes.view._created < min(self.created(0), self.created(1))

    def teardown(self) -> None:
        if not hasattr(self, "nodes"):
            return
        with contextlib.ExitStack() as steps:
            steps.callback(shutil.rmtree, self.folder)
            for account in self.nodes.accounts:
                steps.callback(die, account)
                ATTACHED.remove(account)
            steps.callback(self.nodes.close)
            self.all_is_reported_in_the_end()

    def all_is_reported_in_the_end(self) -> None:
        """Once no message is lost any more, each side knows every field that the other has written."""
        self.now += 2.0  # every request for memory has lapsed
        for _ in range(3):
            self.nodes.exchange()
            self.held()
            for rank in (0, 1):
                self.plans[rank] = [self.released]
                self.give_back(rank, 2 * TOTAL)
        self.nodes.exchange()
        held = self.held()
        assert held == min(self.created(rank) - self.freed(rank) for rank in (0, 1))
        self.nodes.exchange()
        (slot,) = self.nodes.agent._slots
        remote_slot = self.nodes.remote_slot
        assert all(
            slot.words[slot.at[name]] == remote_slot.words[remote_slot.at[name]] for name in ENGINE_WORDS
        )


def test_i5_an_engine_on_two_nodes_never_counts_on_missing_memory() -> None:
    quiet = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)
    run_state_machine_as_test(LinkMachine, settings=settings(quiet, max_examples=300, stateful_step_count=50))
    assert LinkMachine.withdrawn and LinkMachine.too_low, "orders were given, and news were late"
    record("nodes.steps", LinkMachine.steps)
