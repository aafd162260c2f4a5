"""Drivers are opened by name, and an unused driver imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pluggy
import pytest

from kvcached_core import hooks
from kvcached_core.driver.host import HostDriver
from kvcached_core.driver.registry import open_driver
from kvcached_core.errors import ConfigError
from tests.core.test_driver_host import PAGE

ROOT = Path(__file__).resolve().parents[2]


def test_drivers_are_opened_by_name_and_plugins_may_add_theirs() -> None:
    opened = open_driver("host", capacity_bytes=PAGE)
    assert isinstance(opened, HostDriver) and opened.memory().total_bytes == PAGE
    opened.close()

    class Mine:
        @hooks.hookimpl
        def kvcached_driver(self, name: str) -> object | None:
            return "mine" if name == "mine" else None

    manager: pluggy.PluginManager = hooks.new_plugin_manager()
    manager.register(Mine(), "mine")
    assert open_driver("mine", manager=manager) == "mine"  # type: ignore[comparison-overlap]
    with pytest.raises(ConfigError, match="'rocm' is not known: expected one of cuda, host, mine"):
        open_driver("rocm", manager=manager)
    assert hooks.plugin_manager() is hooks.plugin_manager()


def test_hooks_import_nothing_heavy() -> None:
    code = (
        "import sys, kvcached_core.hooks as h; h.plugin_manager(); import kvcached_core.worker.pool;"
        "print([m for m in ('torch', 'cupy', 'cuda', 'numpy') if m in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert child.stdout.strip() == "[]", child.stderr
