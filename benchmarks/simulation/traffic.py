"""The requests of clients: Poisson bursts. In each stage a random draw decides which owners' clients send."""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

BLOCK_TOKENS = 16
STAGE_SECONDS = 4.0
PROMPTS = (256, 512, 1024, 2048)  # tokens
SHORT, LONG = (32, 48, 64, 96), (200, 400, 600)  # tokens of short and long answers


class Arrival(NamedTuple):
    """A request: its time in seconds since the beginning, and its tokens."""

    at: float
    prompt: int
    answer: int


class Clients(NamedTuple):
    """The clients of one owner: in each stage they send with probability `chance`.

    `press` is the load: the share of the device that their requests would hold if all fitted.
    """

    press: float
    chance: float = 0.5
    answers: Sequence[int] = SHORT

    def send_in(self, owner: int, stage: int) -> bool:
        """Return whether the clients of this owner send in a stage."""
        return random.Random(f"{owner} {stage}").random() < self.chance

    def per_second(self, blocks: int, step_seconds: float) -> float:
        """Return the requests per second that put this load on a device of `blocks` blocks."""
        of_one = 1 + (fmean(PROMPTS) + fmean(self.answers) / 2) / BLOCK_TOKENS
        return self.press * blocks / of_one / (fmean(self.answers) * step_seconds)


def arrivals(owner: int, clients: Clients, per_second: float, duration: float) -> list[Arrival]:
    """Return the requests of one owner's clients, in the order of their times."""
    draw = random.Random(owner)
    found, at = [], 0.0
    while (at := at + draw.expovariate(per_second)) < duration:
        if clients.send_in(owner, int(at / STAGE_SECONDS)):
            found.append(Arrival(at, draw.choice(PROMPTS), draw.choice(clients.answers)))
    return found


def changes(clients: Sequence[Clients], duration: float) -> list[float]:
    """Return 0 and the times at which the clients of any owner begin or stop to send."""
    lots = [
        [each.send_in(owner, stage) for owner, each in enumerate(clients)]
        for stage in range(int(duration / STAGE_SECONDS) + 1)
    ]
    return [stage * STAGE_SECONDS for stage, on in enumerate(lots) if not stage or on != lots[stage - 1]]
