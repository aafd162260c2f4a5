"""Many processes on one ledger at once. More processes, and the cost: benchmarks/micro/ledger_lock.py."""

from __future__ import annotations

import contextlib

from devkit.report import record
from kvcached_core.ledger import Runtime, check
from kvcached_core.ledger.file import layout
from tests.ledger.helpers import CAPACITY, PLENTY, attach, child, files, leave, picture

PROCESSES = 8
LEASES = 3000  # in each process

LEASING = f"""
import random
from kvcached_core.errors import BusyError
from kvcached_core.ledger import SchedulerView
from tests.ledger.helpers import CAPACITY, engine_usage
chance = random.Random(instance)
account = attach(runtime, instance, name=instance, weight=chance.choice((50, 100, 200)))
view = SchedulerView.find(runtime, instance, 1)
say("ready")
sys.stdin.readline()
granted = 0
for turn in range({LEASES}):
    want = chance.randint(1, 40)
    if turn % 8 == 0:
        held = account.ready_bytes // GRANULE
        view.publish(engine_usage(4 * held, 0, 0, max(1, held), max(1, held + want)))
        view.count(0, 0, True, 0)
    try:
        got = account.lease(want * GRANULE, PLENTY) // GRANULE
    except BusyError:  # on a machine with too few cores for all of these
        got = 0
        account.check()
    granted += got
    account.created(got)
    account.publish(chance.randint(0, account.ready_bytes // GRANULE) * GRANULE, 0)
    target, held = view.target_granules(), account.ready_bytes // GRANULE
    keep = min(target or held, chance.randint(0, held))
    account.give_back(granules_released=held - keep)
    account.check()
view.close()
leave(account)
say(f"granted {{granted}}")
"""


def test_i1_to_i4_hold_in_every_snapshot_while_processes_lease_without_pause(runtime: Runtime) -> None:
    watcher = attach(runtime, "watcher", name="watcher")
    readings = settled = 0
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(child(runtime, LEASING, f"p{n}")) for n in range(PROCESSES)]
        for process in crowd:
            assert process.read_line() == "ready"
        for process in crowd:
            process.resume()
        said: list[str] = []
        while len(said) < PROCESSES:
            seen = picture(runtime)
            assert check(seen) == []
            readings += 1
            settled += seen.settled
            if crowd[len(said)].has_output(0.002):
                said.append(crowd[len(said)].read_line())
    for line in said:
        word, granted = line.split()
        assert word == "granted" and int(granted) > 0, "nobody starves"
    assert settled > 0
    assert [owner.instance for owner in picture(runtime).owners] == ["watcher"]
    assert watcher.lease(CAPACITY, PLENTY) == CAPACITY, "no byte is lost"
    leave(watcher)
    assert files(runtime) == {"ledger", "lock"}, "I11"
    record("ledger.leases", PROCESSES * LEASES)
    record("ledger.readings", readings)


ATTACHING = """
say("ready")
sys.stdin.readline()
account = attach(runtime, instance)
say(f"{account.slot} {account.name} {account.lease(GRANULE, PLENTY) // GRANULE}")
sys.stdin.readline()
"""


def test_i4_as_many_as_there_are_slots_attach_in_the_same_second(runtime: Runtime) -> None:
    names = ["m", *(f"m-{n}" for n in range(2, layout.SLOT_COUNT + 1))]
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(child(runtime, ATTACHING, f"c{n}")) for n in range(layout.SLOT_COUNT)]
        for process in crowd:
            assert process.read_line() == "ready"
        for process in crowd:
            process.resume()
        said = [process.read_line().split() for process in crowd]
        assert sorted(int(slot) for slot, _, _ in said) == list(range(layout.SLOT_COUNT))
        assert sorted(name for _, name, _ in said) == sorted(names)
        assert [granted for _, _, granted in said] == ["1"] * layout.SLOT_COUNT
        assert check(picture(runtime)) == []
        record("ledger.attached_at_once", len(said))
