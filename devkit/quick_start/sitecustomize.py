"""Make engines under test use less processor time. Python imports this module at its start."""

import gc
import os
import time


def _sleep_a_moment() -> None:
    time.sleep(0.0002)


# An engine's start is mostly imports. Garbage collection is a fifth of that time and finds no garbage.
gc.set_threshold(100_000, 50, 100)
# A process that waits yields the processor in a loop; with few cores it slows the process it waits for.
os.sched_yield = _sleep_a_moment
