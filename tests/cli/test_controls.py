"""kvctl limit, limit-percent, floor and weight."""

from __future__ import annotations

import json

import pytest

from kvcached_core.driver.base import DeviceIdentity
from kvcached_core.ledger import Runtime, snapshot
from tests.cli.conftest import Run, worker
from tests.ledger.helpers import CAPACITY, GRANULE, HOST, attach, hold, picture


def test_a_limit_waits_until_it_holds(runtime: Runtime, run: Run) -> None:
    account = attach(runtime, "a")
    hold(account, 3)
    with worker(account):
        code, out, err = run("limit", "m", "8MiB", "--wait", "60")
        assert (code, err) == (0, "") and "8 MiB  3 MiB  holds" in out
        code, out, _ = run("limit-percent", "m", "50", "--json", "--wait", "60")
    data = json.loads(out)
    assert code == 0 and data["version"] == 1 and data["holds"] is True
    (rank,) = data["ranks"]
    assert (rank["limit_bytes"], rank["leased_bytes"], rank["acknowledged"]) == (
        CAPACITY // 2,
        3 * GRANULE,
        True,
    )
    assert account.limit_bytes == CAPACITY // 2


def test_a_limit_that_times_out_exits_with_4_and_says_why(runtime: Runtime, run: Run) -> None:
    account = attach(runtime, "a")
    hold(account, 20)
    code, out, err = run("limit", "m", "8MiB", "--wait", "0.05")
    assert code == 4 and "not acknowledged" in out and "1 of 1 ranks have not acknowledged it" in err
    with worker(account):
        code, out, err = run("limit", "m", "9MiB", "--wait", "0.05", "--json")
    assert code == 4 and json.loads(out)["holds"] is False
    assert "does not hold after 0.05 s" in err and "kvctl list m" in err
    account.give_back(granules_released=12)
    assert run("limit", "m", "8MiB", "--no-wait")[0] == 0


def test_a_limit_below_the_floor_is_set_with_a_message(runtime: Runtime, run: Run) -> None:
    account = attach(runtime, "a", floor_bytes=10 * GRANULE)
    with worker(account):
        code, _, err = run("limit", "m", "4MiB", "--wait", "60")
    assert code == 0 and "below its floor of 10 MiB" in err and "its floor is the limit, 4 MiB" in err


def test_a_limit_for_one_device_leaves_other_devices_alone(runtime: Runtime, run: Run) -> None:
    accounts = [attach(runtime, "a", 0), attach(runtime, "a", 1, device=DeviceIdentity("GPU-9", "gpu"))]
    assert run("limit", "m", "4MiB", "--device", "GPU-9", "--no-wait")[0] == 0
    for account in accounts:
        account.acknowledge()
    assert [account.limit_bytes for account in accounts] == [CAPACITY, 4 * GRANULE]


def test_a_floor_waits_until_it_is_acknowledged(runtime: Runtime, run: Run) -> None:
    account = attach(runtime, "a")
    hold(account, 20)
    with worker(account):
        code, out, err = run("floor", "m", "8MiB", "--wait", "60")
        assert (code, err) == (0, "")
        assert " ".join(out.split()) == "RANK DEVICE FLOOR STATE 0 host 8 MiB holds"
        code, out, _ = run("floor", "m", "25%", "--wait", "60", "--json")
    (rank,) = json.loads(out)["ranks"]
    assert code == 0 and (rank["floor_bytes"], rank["acknowledged"]) == (CAPACITY // 4, True)
    assert account.floor_bytes == CAPACITY // 4


def test_a_floor_that_does_not_fit_exits_with_1_and_the_sizes_and_changes_nothing(
    runtime: Runtime, run: Run
) -> None:
    account = attach(runtime, "a", floor_bytes=GRANULE)
    attach(runtime, "b", name="other", floor_bytes=10 * GRANULE)
    code, out, err = run("floor", "m", "60MiB")
    assert (
        (code, out) == (1, "")
        and "60 MiB" in err
        and "10 MiB" in err
        and "lower another engine's floor" in err
    )
    account.acknowledge()
    assert account.floor_bytes == GRANULE
    with worker(account):
        assert run("floor", "m", "54MiB", "--wait", "60")[0] == 0


def test_a_floor_above_the_limit_is_set_with_a_message(runtime: Runtime, run: Run) -> None:
    attach(runtime, "a", limit_bytes=4 * GRANULE)
    code, _, err = run("floor", "m", "10MiB", "--no-wait")
    assert code == 0 and "below its floor of 10 MiB" in err and "its floor is the limit, 4 MiB" in err


def test_a_weight_waits_until_it_is_acknowledged(runtime: Runtime, run: Run) -> None:
    account = attach(runtime, "a")
    with worker(account):
        code, out, err = run("weight", "m", "250", "--wait", "60")
        assert (code, err) == (0, "")
        assert " ".join(out.split()) == "RANK DEVICE WEIGHT STATE 0 host 250 holds"
        code, out, _ = run("weight", "m", "300", "--wait", "60", "--json")
    (rank,) = json.loads(out)["ranks"]
    assert code == 0 and (rank["weight"], rank["holds"]) == (300, True)
    (owner,) = picture(runtime).owners
    assert owner.weight_applied == 300


@pytest.mark.parametrize(("control", "value"), [("floor", "2MiB"), ("weight", "5")])
def test_a_control_that_is_not_acknowledged_in_time_exits_with_4_and_stays_set(
    runtime: Runtime, run: Run, control: str, value: str
) -> None:
    attach(runtime, "a")
    code, out, err = run(control, "m", value, "--wait", "0.05")
    assert code == 4 and "not acknowledged" in out
    assert f"the {control} of m does not hold after 0.05 s: 1 of 1 ranks have not acknowledged it" in err
    (owner,) = picture(runtime).owners
    assert (owner.floor_wanted, owner.weight_wanted) == ((2 * GRANULE, 100) if control == "floor" else (0, 5))
    assert run(control, "m", value, "--no-wait")[0] == 0


def test_controls_are_set_on_every_rank_and_device(runtime: Runtime, run: Run) -> None:
    devices = [HOST, DeviceIdentity("GPU-9", "gpu")]
    accounts = [attach(runtime, "a", rank, device=device) for rank, device in enumerate(devices)]
    run("weight", "m", "7", "--no-wait")
    run("floor", "m", "3MiB", "--no-wait", "--device", "GPU-9")
    for account in accounts:
        account.acknowledge()
    assert [account.floor_bytes for account in accounts] == [0, 3 * GRANULE]
    assert [owner.weight_applied for device in snapshot(runtime) for owner in device.owners] == [7, 7]
