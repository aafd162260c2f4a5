"""kvtop, driven by Textual's pilot and in a real terminal."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from textual.pilot import Pilot

from devkit.ledger_scene import GPUS, GRANULE, crowd, play, put, sampler
from kvcached_core.driver.base import DeviceIdentity
from kvcached_core.ledger import Runtime
from kvcached_core.units import GIB
from kvctl.kvtop.app import TopApp
from kvctl.kvtop.screen import ViewState
from tests.cli.conftest import Run, worker
from tests.cli.owner import SIZE
from tests.cli.process import kvctl, owner, until
from tests.cli.terminal import terminal
from tests.ledger.helpers import attach, die

pytestmark = pytest.mark.alone


def drive(
    app: TopApp, work: Callable[[Pilot[None]], Awaitable[None]], size: tuple[int, int] = (80, 24)
) -> None:
    """Run the application without a terminal while `work` presses keys."""

    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await work(pilot)

    asyncio.run(run())


def screen(app: TopApp) -> list[str]:
    """Return the lines on the screen."""
    return [strip.text.rstrip() for strip in app.screen._compositor.render_strips()]


async def until_shown(pilot: Pilot[None], app: TopApp, text: str) -> None:
    """Wait until the status line shows the text."""
    for _ in range(1000):
        if text in str(app._status.render()):
            return
        await pilot.pause(0.01)
    raise AssertionError(f"{app._status.render()} does not say {text!r}")


def test_keys(runtime: Runtime) -> None:
    accounts = play(runtime)
    app = TopApp(runtime, sampler(runtime), ViewState())

    async def work(pilot: Pilot[None]) -> None:
        order = app._keys()
        assert len(order) == 5 and app.view.selected == order[0]
        for pressed, at in (("j", 1), ("down", 2), ("k", 1), ("end", 4), ("down", 4), ("home", 0),
                            ("pagedown", 4), ("pageup", 0)):  # fmt: skip
            await pilot.press(pressed)
            assert app.view.selected == order[at], pressed
        await pilot.press("space", "space")
        assert app.view.marked == {order[0], order[1]} and "2 marked" in screen(app)[0]
        await pilot.press("s", "S")
        assert (app.view.order, app.view.reverse) == ("name", True)
        await pilot.press("slash", *"QWEN", "enter")
        assert [key[1] for key in app._keys()] == ["qwen3-8b"] and "filter 'Q" in screen(app)[0]
        await pilot.press("slash", *"x", "escape")
        assert app.view.filter == "QWEN", "Escape discards the typed line"
        await pilot.press("escape")
        assert (app.view.filter, app.view.marked) == ("", set())
        for pressed in ("h", "question_mark", "f1"):
            await pilot.press(pressed)
            assert "Any key closes this help." in "".join(screen(app))
            await pilot.press("z")
            assert len(app.screen_stack) == 1
        await pilot.press("q")

    drive(app, work)
    assert app.return_code == 0 and len(accounts) == 5


def test_limit_and_trim_act_on_marked_engines_and_show_the_outcome(runtime: Runtime) -> None:
    first, second = attach(runtime, "a", name="llama"), attach(runtime, "b", name="qwen")
    app = TopApp(runtime, sampler(runtime), ViewState(order="name"))

    async def work(pilot: Pilot[None]) -> None:
        await pilot.press("l", *"9M", "enter")
        await until_shown(pilot, app, "llama: limit 9 MiB holds")
        await pilot.press("l", *"9 apples", "enter")
        await until_shown(pilot, app, "'9 apples': expected bytes")
        await pilot.press("space", "space", "l", *"8M", "enter")
        await until_shown(pilot, app, "llama: limit 8 MiB holds; qwen: limit 8 MiB holds")
        await pilot.press("t")
        await until_shown(pilot, app, "llama: trimmed; qwen: trimmed")
        assert app.focused is None

    with worker(first), worker(second):
        drive(app, work)
    assert first.limit_bytes == second.limit_bytes == 8 << 20


def test_readonly_changes_nothing(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    app = TopApp(runtime, sampler(runtime), ViewState(), readonly=True)

    async def work(pilot: Pilot[None]) -> None:
        assert "limit" not in screen(app)[-1]
        for key in ("l", "t"):
            await pilot.press(key)
            await until_shown(pilot, app, "--readonly")
            await pilot.press("escape")

    drive(app, work)
    account.acknowledge()
    assert account.limit_bytes == 64 << 20


def test_engines_and_devices_may_come_and_go(runtime: Runtime) -> None:
    app = TopApp(runtime, sampler(runtime), ViewState())

    async def work(pilot: Pilot[None]) -> None:
        assert "no engine is running" in "\n".join(screen(app))
        first, second = attach(runtime, "a", name="one"), attach(runtime, "b", name="two")
        other = attach(runtime, "c", name="three", device=DeviceIdentity("GPU-1", "gpu"))
        app.refresh_sample()
        await pilot.press("end", "space")
        assert "2 devices  3 ranks" in screen(app)[0]
        die(second)
        app.refresh_sample()
        await pilot.pause()
        assert any("ended" in line for line in screen(app))
        other.detach()
        first.detach()  # removes the slots of dead engines
        for path in runtime.device("GPU-1").path.iterdir():
            path.unlink()
        runtime.device("GPU-1").path.rmdir()
        app.refresh_sample()
        await pilot.pause()
        assert "1 device  0 ranks" in screen(app)[0]
        runtime.device("host").ledger.write_bytes(b"x" * 9000)
        app.refresh_sample()
        await pilot.pause()
        assert "damaged" in "".join(screen(app))
        runtime.path.chmod(0)
        runtime.path.rename(runtime.path.with_name("gone"))
        app.refresh_sample()
        await pilot.press("down", "space", "t", "s")

    drive(app, work)


@pytest.mark.parametrize("count", [1, 9, 32])
def test_kvtop_follows_the_size_of_the_terminal(runtime: Runtime, count: int) -> None:
    accounts = play(runtime, crowd(count))
    app = TopApp(runtime, sampler(runtime), ViewState())

    async def work(pilot: Pilot[None]) -> None:
        for width, height in ((80, 24), (200, 60), (30, 6), (80, 24)):
            await pilot.resize_terminal(width, height)
            await pilot.pause()
            shown = screen(app)
            assert len(shown) == height and max(map(len, shown)) <= width and "kvtop" in shown[0]
            names = [line for line in shown if "engine-" in line]
            assert names and (len(names) == count) == (count + 8 <= height or (count, height) == (1, 6))

    drive(app, work)
    assert len(accounts) == count


def _seconds_to_add(numbers: int) -> float:
    """Return the CPU seconds of adding so many numbers, as a measure of the machine's speed now."""
    begun, total = time.process_time(), 0
    for number in range(numbers):
        total += number
    return time.process_time() - begun


def test_a_refresh_costs_less_than_adding_300000_numbers(runtime: Runtime) -> None:
    # That is one or two hundredths of the second between two refreshes.
    accounts = play(runtime, crowd(32))
    app = TopApp(runtime, sampler(runtime), ViewState())
    taken: list[float] = []
    measure: list[float] = []

    async def work(pilot: Pilot[None]) -> None:
        for n in range(30):
            put(runtime, 0, accounts[n].slot, used_bytes=GRANULE * (n + 1))
            begun = time.process_time()
            app.refresh_sample()
            await pilot.pause()
            taken.append(time.process_time() - begun)
            measure.append(_seconds_to_add(300_000))

    drive(app, work)
    # CPU seconds, the pilot included, so that other work on the machine does not count.
    assert min(taken) < min(measure), (sorted(taken), sorted(measure))


@pytest.mark.parametrize(("color", "coloured"), [("auto", True), ("never", False)])
def test_colours_are_left_out_when_asked(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, color: str, coloured: bool
) -> None:
    monkeypatch.setenv("NO_COLOR", "")  # an empty value means not set
    accounts = play(runtime)
    app = TopApp(runtime, sampler(runtime), ViewState(), color=color)
    drawn = ""

    async def work(pilot: Pilot[None]) -> None:
        nonlocal drawn
        drawn = app.export_screenshot()

    drive(app, work)
    assert ("#e5a04f" in drawn) == coloured and len(accounts) == 5


def test_once_prints_the_bars_and_exits(runtime: Runtime, run: Run) -> None:
    accounts = play(runtime)
    code, out, err = run("kvtop", "--once")
    assert (code, err) == (0, "") and "qwen3-8b" in out and max(map(len, out.splitlines())) <= 100
    code, out, _ = run("kvtop", "--once", "mistral-7b")
    assert "qwen3-8b" not in out and GPUS[1] not in out and "mistral-7b" in out
    assert '"demand_bytes": 3221225472' in run("kvtop", "--once", "--json")[1]
    assert run("kvtop", "--once", "--device", "1")[1].startswith("kvtop 0.1.0") and len(accounts) == 5
    assert 3 * GIB == 3221225472


def test_kvtop_without_a_terminal_names_the_alternative(runtime: Runtime, run: Run) -> None:
    code, out, err = run("kvtop")
    assert (code, out) == (1, "") and "kvtop --once" in err
    assert run("kvtop", "--json")[0] == 2 and run("kvtop", "nobody")[0] == 3


def test_kvtop_in_a_terminal_with_a_live_engine(runtime: Runtime) -> None:
    with owner(runtime, "llama") as engine, terminal(f"{sys.executable} -m kvctl kvtop", runtime) as shown:
        engine.say(f"serve {4 * SIZE} {8 * SIZE}")
        seen = shown.wait_for("llama", "busy", "Prealloc: 2.0 MiB | Used: ")
        assert all(len(line) <= 80 for line in seen.splitlines()) and len(seen.splitlines()) <= 24
        shown.type("l", "32M", "Enter")
        shown.wait_for("llama: limit 32 MiB holds", "/32M")
        shown.type("t")
        shown.wait_for("llama: trimmed")
        until(lambda: "cached 2" not in shown.screen(), "its cache is gone")
        assert "\x1b[38;2;" in shown.screen(colours=True) or "\x1b[38;5;" in shown.screen(colours=True)
        shown.resize(200, 60)
        shown.wait_for("·" * 100)  # the bar is as wide as the terminal
        engine.end()
        shown.wait_for("ended")
        shown.type("q")
        until(shown.ended, "q leaves")


def test_kvtop_in_a_terminal_without_colours_ends_with_ctrl_c(runtime: Runtime) -> None:
    accounts = play(runtime)
    with terminal(f"{sys.executable} -m kvctl kvtop --refresh 0.25", runtime, NO_COLOR="1") as shown:
        shown.wait_for("llama-70b")
        assert not re.search(r"\x1b\[[34]8;[25];(?!(\d+);\1;\1)", shown.screen(colours=True)), "no hue"
        shown.type("C-c")
        until(shown.ended, "Ctrl-C leaves")
    assert len(accounts) == 5


@pytest.mark.parametrize("command", ["kvtop", "watch -n 0.1"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_kvtop_and_watch_and_restores_the_terminal(
    runtime: Runtime, tmp_path: Path, command: str, number: signal.Signals
) -> None:
    accounts = play(runtime)
    pid = tmp_path / "pid"
    # The shell prints its process id and then becomes kvctl.
    line = f"sh -c 'echo $$ > {pid}; exec {sys.executable} -m kvctl {command}'; echo code $?; stty -a; cat"
    with terminal(line, runtime) as shown:
        shown.wait_for("llama-70b")
        assert shown.has_other_screen()
        os.kill(int(pid.read_text()), number)
        seen = shown.wait_for(f"code {128 + number}", " icanon", " echo ")
        assert not shown.has_other_screen() and ("llama-70b" in seen) == (command != "kvtop")
    assert len(accounts) == 5


def test_the_program_kvtop(runtime: Runtime) -> None:
    code = "import sys; from kvctl.main import kvtop; sys.exit(kvtop())"
    command = f"{sys.executable} -c '{code}' --refresh 0.1; echo code $?; cat"
    with terminal(command, runtime) as shown:
        shown.wait_for("kvctl: argument --refresh: '0.1': expected 0.25 to 86400 seconds", "code 2")
    assert "--readonly" in kvctl("kvtop", "--help", runtime=runtime).stdout
