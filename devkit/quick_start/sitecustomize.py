"""Save processor time in engines under test, which two suites share."""

import gc
import os
import time


def _sleep_a_moment() -> None:
    time.sleep(0.0002)


# Most of a start is imports, and a fifth of that time is garbage collection that finds no garbage.
gc.set_threshold(100_000, 50, 100)
# A process that waits for another one yields in a loop, and takes processor time from it where cores are few.
os.sched_yield = _sleep_a_moment
