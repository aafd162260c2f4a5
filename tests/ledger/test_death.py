"""kill -9 and SIGSTOP of real processes, at every point where they change the ledger."""

from __future__ import annotations

import itertools
import os
import signal

import pytest

from kvcached_core.errors import BusyError
from kvcached_core.ledger import Account, Runtime, check, snapshot
from kvcached_core.ledger.lock import LedgerLock
from tests.ledger.helpers import CAPACITY, GRANULE, PLENTY, Child, attach, child, files, hold, leave, picture
from tests.report import record

# A whole life, in a fork that kills itself at the n-th write point, or lives on and says how many there are.
LIFE = """
def life():
    account = attach(runtime, instance, name="mortal", floor_bytes=GRANULE)
    account.lease(6 * GRANULE, PLENTY); account.created(4)
    account.publish(3 * GRANULE, 5, maps=3)
    account.give_back(bytes_never_ready=GRANULE)
    set_limit(runtime, "mortal", 2 * GRANULE)
    account.acknowledge()
    account.give_back(granules_released=2)
    desk = Desk.find(runtime, instance, 1)
    desk.publish(Usage(1, 1, 1, 9, 2)); desk.count(1, 1, True); desk.close()
    if LOSE_THE_FILE:
        runtime.device("host").ledger.unlink()
        account.acknowledge()
        account.lease(GRANULE, PLENTY)
    leave(account)

from kvcached_core.ledger import Desk, set_limit
from tests.ledger.helpers import Usage
for line in sys.stdin:
    n = int(line)
    pid = os.fork()
    if not pid:
        passed = 0
        def reached(name):
            global passed
            passed += 1
            if passed == n:
                os.kill(os.getpid(), signal.SIGKILL)
        storage.set_write_hook(reached)
        life()
        say(f"lived {passed}")
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        say(f"killed {os.WTERMSIG(status)}")
    elif os.WEXITSTATUS(status):
        say(f"failed {os.WEXITSTATUS(status)}")
"""


def ask(mortal: Child, n: int) -> str:
    assert mortal.process.stdin is not None
    mortal.process.stdin.write(f"{n}\n".encode())
    mortal.process.stdin.flush()
    return mortal.hear()


@pytest.mark.parametrize("lose_the_file", [False, True])
def test_i1_i2_i11_hold_when_killed_at_every_write_point(runtime: Runtime, lose_the_file: bool) -> None:
    survivor = attach(runtime, "survivor", name="survivor", floor_bytes=GRANULE)
    hold(survivor, 10)
    with child(runtime, f"LOSE_THE_FILE = {lose_the_file}\n{LIFE}", "mortal") as mortal:
        for n in itertools.count(1):
            answer = ask(mortal, n)
            if not answer.startswith("killed"):
                break
            assert answer == f"killed {signal.SIGKILL}"
            assert [wrong for device in snapshot(runtime) for wrong in check(device)] == [], f"point {n}"
            survivor.acknowledge()
            assert check(picture(runtime)) == []
            # Nobody's memory is lost, and the lock is free.
            assert survivor.lease(CAPACITY, PLENTY) == CAPACITY - 10 * GRANULE
            survivor.give_back(bytes_never_ready=CAPACITY - 10 * GRANULE)
            leave(attach(runtime, "next", name="next"))
            assert [owner.instance for owner in picture(runtime).owners] == ["survivor"]
            assert len(files(runtime)) == 2 + 3, f"I11 after point {n}"
    assert answer == f"lived {n - 1}", "every point was killed at"
    assert n > 100
    record("ledger.write_points", n - 1)
    record("ledger.kills", n - 1)
    survivor.check()
    leave(survivor)


def stopped_at(runtime: Runtime, point: str) -> str:
    return f"""
account = attach(runtime, instance)
hold(account, 4)
def reached(name):
    if name == {point!r}:
        storage.set_write_hook(None)
        os.kill(os.getpid(), signal.SIGSTOP)
say("ready")
storage.set_write_hook(reached)
try:
    account.lease(8 * GRANULE, PLENTY)
finally:
    say(f"leased {{account.leased_bytes // GRANULE}}")
    sys.stdin.readline()
"""


class Clock:
    """Time that passes by sleeping in it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def attach_with_clock(runtime: Runtime, clock: Clock) -> Account:
    account = attach(runtime, "waiter", name="w")
    account._lock = LedgerLock(runtime.device("host").lock, clock=clock, sleep=clock.sleep)
    return account


def await_stop(process: Child) -> None:
    _, status = os.waitpid(process.process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)


@pytest.mark.parametrize("point", ["free_bytes", "demand_bytes", "leased_bytes", "leases"])
def test_i8_a_holder_that_is_stopped_stalls_growth_only(runtime: Runtime, point: str) -> None:
    clock = Clock()
    account = attach_with_clock(runtime, clock)
    hold(account, 4)
    with child(runtime, stopped_at(runtime, point)) as holder:
        assert holder.hear() == "ready"
        await_stop(holder)
        before = picture(runtime)
        with pytest.raises(BusyError, match="nothing was changed"):
            account.lease(GRANULE, PLENTY)
        assert 1.0 <= clock.now < 1.1
        assert picture(runtime) == before
        account.give_back(granules_released=1)  # what falls needs no lock
        account.publish(0, 0)
        account.acknowledge()
        account.check()
        assert check(picture(runtime)) == []
        os.kill(holder.process.pid, signal.SIGCONT)
        assert holder.hear() == "leased 12"
        assert account.lease(GRANULE, PLENTY) == GRANULE


@pytest.mark.parametrize("point", ["free_bytes", "demand_bytes", "leased_bytes", "leases"])
def test_i1_death_inside_the_lock_frees_it_and_the_bytes(runtime: Runtime, point: str) -> None:
    account = attach(runtime, "waiter", name="w")
    with child(runtime, stopped_at(runtime, point)) as holder:
        assert holder.hear() == "ready"
        await_stop(holder)
        holder.kill()
        record("ledger.kills", 1)
        assert check(picture(runtime)) == []
        assert account.lease(CAPACITY, PLENTY) == CAPACITY


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
            assert owner.hear() == "holds"
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
        grandchild = int(owner.hear())
        try:
            assert picture(runtime).owners[0].live
            owner.kill()
            os.kill(grandchild, 0)  # it lives on
            assert not picture(runtime).owners[0].live
        finally:
            os.kill(grandchild, signal.SIGKILL)


def test_i4_what_a_forked_child_does_leaves_its_parent_in_place(runtime: Runtime) -> None:
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
        assert owner.hear() == "forked 0"
        (seen,) = picture(runtime).owners
        assert seen.live and seen.instance == "child"


def test_many_that_attach_at_once_all_get_a_slot_of_their_own(runtime: Runtime) -> None:
    body = """
sys.stdin.readline()
account = attach(runtime, instance)
say(f'{account.slot} {account.name}')
sys.stdin.readline()
"""
    children = [Child(runtime, body, f"c{n}") for n in range(6)]
    try:
        for process in children:
            process.tell()
        said = [process.hear().split() for process in children]
        assert sorted(slot for slot, _ in said) == [str(n) for n in range(6)]
        assert sorted(name for _, name in said) == ["m", "m-2", "m-3", "m-4", "m-5", "m-6"]
    finally:
        for process in children:
            process.close()
