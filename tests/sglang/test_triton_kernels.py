"""SGLang's Triton attention reads every layout: its kernels run in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_triton_attention_and_moves_give_stocks_results_in_every_layout(tmp_path: Path) -> None:
    # Its own process: Triton reads the variable when a kernel is imported.
    done = subprocess.run(
        [sys.executable, "-m", "tests.sglang.triton_kernels", str(tmp_path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "SGLANG_USE_CPU_ENGINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    kernels = ("move", "decode 1", "decode 16", "extend 1", "extend 16")
    expected = {f"{layout}: {kernel}" for layout in ("layer", "block") for kernel in kernels}
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(expected, True)
