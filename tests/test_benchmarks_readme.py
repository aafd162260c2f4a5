"""benchmarks/README.md names every program and every result, and nothing that does not exist."""

from __future__ import annotations

import importlib.util
import re

from tools.wheels import ROOT

BENCHMARKS = ROOT / "benchmarks"
README = (BENCHMARKS / "README.md").read_text()
CHILDREN = {  # only other programs start them
    "benchmarks.engine.sglang_rounds", "benchmarks.engine.vllm_rounds", "benchmarks.lib.ledger_watch",
    "benchmarks.lib.sglang_child", "benchmarks.lib.vllm_child", "benchmarks.sharing.third_process",
}  # fmt: skip


def programs() -> set[str]:
    """Return the modules of benchmarks/ that can be run."""
    paths = [path for path in BENCHMARKS.rglob("*.py") if '__name__ == "__main__"' in path.read_text()]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {module.removesuffix(".__main__") for module in modules} - CHILDREN


def test_every_program_has_a_command_and_every_command_a_program() -> None:
    commands = set(re.findall(r"`python -m (benchmarks[\w.]+)", README))
    assert commands == programs()
    assert all(importlib.util.find_spec(name) for name in CHILDREN)


def test_every_result_is_named_and_every_named_result_is_there() -> None:
    named = set(re.findall(r"`(\w+\.json)`", README))
    assert named == {path.name for path in (BENCHMARKS / "results").glob("*.json")}


def test_every_folder_is_named() -> None:
    folders = {path.name for path in BENCHMARKS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(re.findall(r"^\| `(\w+)/` \|", README, re.MULTILINE)) == folders
