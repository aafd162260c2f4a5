"""Find the programs that tests start: beside this Python, in build/programs, or on PATH."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_FOLDERS = (Path(sys.executable).parent, ROOT / "build" / "programs" / "bin")


def program(name: str) -> str:
    """Return the path of a program. Without it the test is skipped, and the test report says so."""
    path = os.pathsep.join((*map(str, _FOLDERS), os.environ.get("PATH", os.defpath)))
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"{name} is not installed: tools/setup_programs.sh says why")
    return found
