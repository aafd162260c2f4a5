"""An access to an unmapped page faults."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


STRAY_ACCESS = """
import ctypes
from kvcached_core.driver.host import HostDriver
driver = HostDriver(1 << 20)
address, handle = driver.reserve(1 << 16), driver.create(1 << 14)
driver.map(address, 1 << 14, [handle])
ctypes.memset(address, 1, 1 << 14)
{then}
print("touching", flush=True)
ctypes.memset(address{offset}, 1, 1)
print("survived", flush=True)
"""


@pytest.mark.parametrize(
    ("then", "offset", "dies"),
    [
        ("", "", False),
        ("driver.unmap(address, 1 << 14)", "", True),
        ("", " + (1 << 14)", True),
        ("driver.unmap(address, 1 << 14); driver.map(address, 1 << 14, [handle])", "", False),
        ("driver.close()", "", True),
    ],
    ids=["mapped", "unmapped", "never mapped", "mapped again", "closed"],
)
def test_a_touch_of_an_unmapped_page_faults(then: str, offset: str, dies: bool) -> None:
    code = STRAY_ACCESS.format(then=then, offset=offset)
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert child.stdout == ("touching\n" if dies else "touching\nsurvived\n"), child.stderr
    assert child.returncode == (-signal.SIGSEGV if dies else 0)
