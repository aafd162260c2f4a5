"""What spares engines under test the processor, which those of two suites share."""

import gc
import os
import time


def _sleep_a_moment() -> None:
    time.sleep(0.0002)


# Most of a start is imports, and a fifth of that is garbage collection that finds none.
gc.set_threshold(100_000, 50, 100)
# A process that waits for another yields in a loop: where cores are few it takes turns from that one.
os.sched_yield = _sleep_a_moment
