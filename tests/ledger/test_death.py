"""kill -9 and SIGSTOP of real processes, at every point where they change the ledger."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time

import pytest

from devkit.report import record
from kvcached_core.errors import BusyError
from kvcached_core.ledger import Account, Runtime, check, snapshot
from kvcached_core.ledger.file.lock import LedgerLock
from tests.ledger.helpers import CAPACITY, GRANULE, PLENTY, Child, attach, child, files, hold, leave, picture

RANDOM_KILLS = 200
SERVE = "from tests.ledger.lives import serve\nserve(runtime)"


def ask(mortals: Child, *orders: str) -> list[str]:
    """Run these lives at once; return how each one ended, in the order of their ends."""
    assert mortals.process.stdin is not None
    mortals.process.stdin.write(f"{' '.join(orders)}\n".encode())
    mortals.process.stdin.flush()
    return [mortals.read_line() for _ in orders]


def nothing_is_lost(runtime: Runtime, survivor: Account, where: str) -> None:
    """Check that the dead left a sound ledger, a free lock, and all of their memory to others."""
    assert [wrong for device in snapshot(runtime) for wrong in check(device)] == [], where
    survivor.acknowledge()
    assert check(picture(runtime)) == [], where
    assert survivor.lease(CAPACITY, PLENTY) == CAPACITY - 10 * GRANULE, where
    survivor.give_back(bytes_never_ready=CAPACITY - 10 * GRANULE)
    survivor.refuse(0)
    leave(attach(runtime, "next", name="next"))
    assert [owner.instance for owner in picture(runtime).owners] == ["survivor"], where
    assert len(files(runtime)) == 2 + 3, f"I11: {where}"


@pytest.fixture
def survivor(runtime: Runtime) -> Account:
    account = attach(runtime, "survivor", name="survivor", floor_bytes=GRANULE)
    hold(account, 10)
    return account


@pytest.mark.parametrize("lose_the_file", [0, 1])
def test_i1_i2_i11_hold_when_killed_at_every_write_point(
    runtime: Runtime, survivor: Account, lose_the_file: int
) -> None:
    with child(runtime, SERVE, "mortals") as mortals:
        for n in itertools.count(1):
            (answer,) = ask(mortals, f"{n}:0:{lose_the_file}")
            if not answer.startswith("killed"):
                break
            assert answer == f"killed {signal.SIGKILL}"
            nothing_is_lost(runtime, survivor, f"point {n}")
    assert answer == f"lived {n - 1}", "every point was killed at"
    record("ledger.write_points", n - 1)
    record("ledger.kills", n - 1)
    survivor.check()
    leave(survivor)


def test_i1_i2_i11_hold_when_several_are_killed_at_random_moments(
    runtime: Runtime, survivor: Account
) -> None:
    """Two or three pairs at once on one ledger; each dies at a random write point or after a random time."""
    chance = random.Random(3)
    killed = rounds = 0
    with child(runtime, SERVE, "mortals") as mortals:
        while killed < RANDOM_KILLS:
            orders = []
            for _ in range(chance.choice((2, 3))):
                lose = int(chance.random() < 0.1)
                n, after = chance.randrange(1, 500), chance.randrange(500, 60_000)
                orders.append(f"{n}:0:{lose}" if chance.random() < 0.5 else f"0:{after}:{lose}")
            answers = ask(mortals, *orders)
            assert "failed" not in answers, orders
            killed += sum(answer.startswith("killed") for answer in answers)
            rounds += 1
            nothing_is_lost(runtime, survivor, f"round {rounds}: {orders}")
    record("ledger.random_kills", killed)
    record("ledger.kills", killed)


LEASE = "account.lease(CAPACITY, PLENTY)"
START = "account.ask_to_start(CAPACITY // 2, GRANULE, PLENTY)"
POINTS = [
    *((point, LEASE) for point in (
        "free_bytes", "short_at_ms", "kept_until_ms", "demand_bytes", "leased_bytes", "leases",
        "refusals", "target_bytes", "must_bytes", "reclaim_bytes", "asked_until_ms", "coming_bytes",
    )),
    *((point, START) for point in ("queued_at_ms", "short_at_ms", "starting_bytes", "asked_until_ms")),
]  # fmt: skip
each_point = pytest.mark.parametrize(("point", "act"), POINTS)


def stopped_at(point: str, act: str) -> str:
    """Return code of a child that holds 4 granules, then stops under the lock at a write point of `act`."""
    return f"""
from tests.ledger.helpers import CAPACITY
account = attach(runtime, instance)
hold(account, 4)
def reached(name):
    if name == {point!r}:
        storage.set_write_hook(None)
        say("stops")
        os.kill(os.getpid(), signal.SIGSTOP)
storage.set_write_hook(reached)
try:
    {act}
finally:
    say(f"leased {{account.leased_bytes // GRANULE}}")
    sys.stdin.readline()
"""


class Clock:
    """A clock that moves only in sleep()."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def attach_with_clock(runtime: Runtime, clock: Clock) -> Account:
    account = attach(runtime, "waiter", name="w")
    account._membership.lock = LedgerLock(runtime.device("host").lock, clock=clock, sleep=clock.sleep)
    return account


def await_stop(process: Child) -> None:
    _, status = os.waitpid(process.process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)


@each_point
def test_i8_a_holder_that_is_stopped_stalls_growth_only(runtime: Runtime, point: str, act: str) -> None:
    clock = Clock()
    account = attach_with_clock(runtime, clock)
    hold(account, 40)
    with child(runtime, stopped_at(point, act)) as holder:
        assert holder.read_line() == "stops"
        await_stop(holder)
        before = picture(runtime)
        with pytest.raises(BusyError, match="nothing was changed"):
            account.lease(GRANULE, PLENTY)
        assert 1.0 <= clock.now < 1.1
        assert picture(runtime) == before
        account.give_back(granules_released=1)  # giving back needs no lock
        account.publish(0, 0)
        account.acknowledge()
        account.check()
        assert check(picture(runtime)) == []
        os.kill(holder.process.pid, signal.SIGCONT)
        # If it stopped before it read the other slots, it also sees the granule given back meanwhile.
        leased = 4 if act == START else 25 if point == "free_bytes" else 24
        assert holder.read_line() == f"leased {leased}"
        account.lease(GRANULE, PLENTY)
        account.check()
        assert check(picture(runtime)) == []


@each_point
def test_i1_death_inside_the_lock_frees_it_and_the_bytes_for_a_waiter(
    runtime: Runtime, point: str, act: str
) -> None:
    waits = threading.Event()

    def pause(seconds: float) -> None:
        waits.set()
        time.sleep(seconds)

    account = attach(runtime, "waiter", name="w")
    hold(account, 40)
    account._membership.lock = LedgerLock(runtime.device("host").lock, sleep=pause)
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.append(account.lease(CAPACITY, PLENTY)))
    with child(runtime, stopped_at(point, act)) as holder:
        assert holder.read_line() == "stops"
        await_stop(holder)
        thread.start()
        assert waits.wait(10)
        holder.kill()
        thread.join(10)
        record("ledger.kills", 1)
        assert got == [CAPACITY - 40 * GRANULE]
        assert check(picture(runtime)) == []


def test_i4_a_stopped_owner_is_alive(runtime: Runtime) -> None:
    account = attach(runtime, "waiter", name="w")
    body = "account = attach(runtime, instance)\nhold(account, 4)\nos.kill(os.getpid(), signal.SIGSTOP)"
    with child(runtime, body) as owner:
        await_stop(owner)
        assert account.lease(CAPACITY, PLENTY) == CAPACITY - 4 * GRANULE
        assert all(owner.live for owner in picture(runtime).owners)


def test_i4_a_killed_owner_is_swept_and_the_next_attaches(runtime: Runtime) -> None:
    body = 'account = attach(runtime, instance)\nhold(account, 64)\nsay("holds")\nsys.stdin.readline()'
    for _ in range(3):
        with child(runtime, body) as owner:
            assert owner.read_line() == "holds"
            assert picture(runtime).leased_bytes == CAPACITY
            owner.kill()
            record("ledger.kills", 1)
            assert [owner.live for owner in picture(runtime).owners] == [False]
    account = attach(runtime, "next")
    assert account.slot == 0
    hold(account, 64)
    leave(account)
    assert files(runtime) == {"ledger", "lock"}


@pytest.mark.parametrize("how", ["fork", "subprocess"])
def test_i4_a_child_process_does_not_keep_a_dead_owner_alive(runtime: Runtime, how: str) -> None:
    start = {
        "fork": "if not os.fork():\n    say(str(os.getpid()))\n    signal.pause()",
        "subprocess": "import subprocess\nsubprocess.Popen([sys.executable, '-c', "
        "'import os, signal; print(os.getpid(), flush=True); signal.pause()'], close_fds=False)",
    }[how]
    body = f"account = attach(runtime, instance)\n{start}\nsys.stdin.readline()"
    with child(runtime, body) as owner:
        grandchild = int(owner.read_line())
        try:
            assert picture(runtime).owners[0].live
            owner.kill()
            os.kill(grandchild, 0)  # the grandchild is still alive
            assert not picture(runtime).owners[0].live
        finally:
            os.kill(grandchild, signal.SIGKILL)


def test_i4_a_forked_child_does_not_disturb_its_parent(runtime: Runtime) -> None:
    body = """
from kvcached_core.errors import InvariantError
account = attach(runtime, instance)
pid = os.fork()
if not pid:
    for use in (account.acknowledge, lambda: account.publish(0, 0), lambda: account.lease(GRANULE, PLENTY)):
        try:
            use()
            os._exit(1)
        except InvariantError:
            pass
    account.detach()
    os._exit(0)
_, status = os.waitpid(pid, 0)
say(f"forked {os.WEXITSTATUS(status)}")
sys.stdin.readline()
"""
    with child(runtime, body) as owner:
        assert owner.read_line() == "forked 0"
        (seen,) = picture(runtime).owners
        assert seen.live and seen.instance == "child"
