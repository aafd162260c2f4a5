"""docs/writing-a-driver.md: its example runs, and it names every verb."""

from __future__ import annotations

import re
from typing import Any

import pytest

import kvcached_core.driver.registry
from kvcached_core.driver.base import Driver
from kvcached_core.driver.registry import open_driver
from tests.core import test_driver_contract as contract
from tools.wheels import ROOT

TEXT = (ROOT / "docs" / "writing-a-driver.md").read_text()
BLOCKS = re.findall(r"^<!-- run -->\n```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_the_example_runs_and_keeps_the_contract() -> None:
    names: dict[str, Any] = {"__name__": "example"}
    for block in BLOCKS:
        exec(compile(block, "docs/writing-a-driver.md", "exec"), names)
    assert len(BLOCKS) == 2
    manager = names["manager"]
    page = open_driver("host-2m", manager=manager).granularity_bytes
    assert page == 2 << 20
    driver = open_driver("host-2m", capacity_bytes=contract.PAGES * page, manager=manager)
    contract.test_a_driver_has_all_verbs_and_says_what_its_device_is(driver)
    contract.test_a_mapped_page_reads_zero_also_after_use(driver, page)
    driver.close()
    contract.test_a_pool_runs_on_the_driver(
        lambda capacity_bytes: open_driver("host-2m", capacity_bytes=capacity_bytes, manager=manager), page
    )


def test_an_installed_driver_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {"__name__": "example"}
    for block in BLOCKS:
        exec(compile(block, "docs/writing-a-driver.md", "exec"), names)
    monkeypatch.setattr(kvcached_core.driver.registry, "plugin_manager", lambda: names["manager"])
    driver = open_driver("host-2m", capacity_bytes=4 << 20)
    assert driver.identity().uuid == "host-2m"
    driver.close()


def test_every_verb_and_attribute_is_on_the_page() -> None:
    verbs = {name for name in vars(Driver) if not name.startswith("_")} | set(Driver.__annotations__)
    missing = {name for name in verbs if not re.search(rf"`{name}[(`]", TEXT)}
    assert not missing
