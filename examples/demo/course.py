"""The demo's steps: a burst on each engine in turn, a limit lowered and lifted, bursts on both at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence

import httpx

from examples.demo import load, memory, server, summary
from examples.demo.server import BIN, DemoError, Engine
from examples.demo.view import View
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.units import parse_size

# requests of a burst, requests of a short burst, requests at a time, tokens generated for each request
BURST, SHORT_BURST, AT_ONCE, MAX_TOKENS = 20, 12, 16, 56
IDLE_SECONDS = 5.0  # longer than an engine keeps spare memory
CONTROL_SECONDS = 30


class Course:
    """One run against two ready servers; the first engine has its burst alone, then the second."""

    def __init__(
        self, engines: Sequence[Engine], runtime: Runtime, environ: Mapping[str, str], view: View
    ) -> None:
        self.recorder = memory.Recorder(runtime, [engine.name for engine in engines])
        self.outcomes: list[load.Outcome] = []
        self._held: dict[str, dict[str, int]] = {engine.name: {} for engine in engines}
        self._engines, self._environ, self._view = engines, environ, view
        self._clients: dict[str, httpx.AsyncClient] = {}
        self._bursts = 0

    async def run(self) -> summary.Run:
        """Drive the load and return its outcome; raises DemoError or KVCachedError."""
        self._note_held("start")
        async with contextlib.AsyncExitStack() as stack:
            for engine in self._engines:
                client = httpx.AsyncClient(base_url=engine.url, timeout=180.0)
                self._clients[engine.name] = await stack.enter_async_context(client)
            with self._view.live():
                await self._watched()
        held = {name: summary.Held(**moments) for name, moments in self._held.items()}
        limits = {self._engines[1].name: parse_size(server.LOWERED).of(0)}
        return summary.Run(self.outcomes, held, limits, self.recorder.samples[-1].budget)

    async def _watched(self) -> None:
        """Run the steps, and sample the memory meanwhile."""
        steps = asyncio.ensure_future(self._steps())
        watch = asyncio.ensure_future(self.recorder.run(self._view.show))
        try:
            # the sampling task ends by itself only if it failed
            await asyncio.wait({steps, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
            await steps
        finally:
            steps.cancel()
            watch.cancel()
            await asyncio.gather(steps, watch, return_exceptions=True)

    async def _steps(self) -> None:
        first, second = (engine.name for engine in self._engines)
        await self._alone(first, second)
        await self._alone(second, first)
        self._note_held("before_limit")
        await self._limit(second, server.LOWERED)
        await asyncio.sleep(IDLE_SECONDS / 2)
        self._note_held("after_limit")
        await self._burst(second, SHORT_BURST, f"{second} within {server.LOWERED}")
        await self._limit(second, server.BUDGET)
        begun = self.recorder.seconds
        both = (self._burst(name, SHORT_BURST, f"{name}, both at once") for name in (first, second))
        await asyncio.gather(*both)
        for name in (first, second):
            self._held[name]["peak_together"] = self.recorder.peak(name, begun)
        await asyncio.sleep(IDLE_SECONDS)
        self._note_held("end")

    async def _alone(self, name: str, other: str) -> None:
        """Run a burst on one engine while the other idles, then let both idle."""
        begun = self.recorder.seconds
        await self._burst(name, BURST, f"{name}, alone")
        self._held[name]["peak"] = self.recorder.peak(name, begun)
        self._held[name]["peak_used"] = self.recorder.peak_used(name, begun)
        self._held[other]["least_beside"] = self.recorder.least(other, begun)
        await asyncio.sleep(IDLE_SECONDS)
        self._held[name]["idle"] = self.recorder.sample().engines[name].held

    async def _burst(self, name: str, count: int, text: str) -> None:
        """Send `count` requests to an engine, different ones each time."""
        self._bursts += 1
        requests = load.questions(count, self._bursts, MAX_TOKENS)
        self._note(text)
        outcomes = await load.burst(self._clients[name], name, requests, AT_ONCE)
        self.outcomes += outcomes
        failures = [outcome.error for outcome in outcomes if outcome.error]
        self._note(f"{name}: {len(outcomes) - len(failures)} of {len(outcomes)} answered")
        for error in failures[:3]:
            self._view.say(f"failed: {error}")

    async def _limit(self, name: str, size: str) -> None:
        """Set a limit with kvctl, which waits until the engine is below the limit."""
        self._note(f"kvctl limit {name} {size}")
        process = await asyncio.create_subprocess_exec(
            BIN / "kvctl", "limit", name, size,
            env=self._environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        printed, _ = await asyncio.wait_for(process.communicate(), CONTROL_SECONDS)
        for line in printed.decode().splitlines():
            self._view.say(f"    {line}")
        if process.returncode:
            raise DemoError(f"kvctl limit {name} {size} ended with status {process.returncode}")

    def _note_held(self, moment: str) -> None:
        """Record the bytes that every engine holds now."""
        for name, engine in self.recorder.sample().engines.items():
            self._held[name][moment] = engine.held

    def _note(self, text: str) -> None:
        self.recorder.mark(text)
        self._view.say(text)
