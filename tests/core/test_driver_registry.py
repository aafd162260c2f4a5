"""Which driver serves which kind of device."""

from __future__ import annotations

from typing import Any

import pytest

from kvcached_core.config import Config
from kvcached_core.driver.registry import driver_name, is_host, open_for_engine
from kvcached_core.errors import ConfigError
from kvcached_core.hooks import hookimpl, new_plugin_manager
from kvcached_core.units import MIB, Size


class Plugin:
    """A driver's plugin, with or without a kind of device."""

    @hookimpl
    def kvcached_driver(self, name: str) -> Any:
        return None


def manager(**device_types: str | None) -> Any:
    """Return a manager with the built-in drivers and these plugins."""
    made = new_plugin_manager()
    for name, device_type in device_types.items():
        plugin: Any = Plugin()
        if device_type is not None:
            plugin.device_type = device_type
        made.register(plugin, name)
    return made


def test_each_kind_of_device_has_its_driver() -> None:
    plugins = manager(chip="xpu", other=None)
    chosen = [driver_name("auto", kind, plugins) for kind in ("cpu", "cuda", "xpu")]
    assert chosen == ["host", "cuda", "chip"]
    assert is_host("cpu") and not is_host("cuda")
    with pytest.raises(ConfigError, match="no driver serves tpu"):
        driver_name("auto", "tpu", plugins)


def test_a_driver_that_says_nothing_may_serve_any_device_but_the_host() -> None:
    plugins = manager(other=None)
    assert driver_name("other", "cuda", plugins) == "other"
    with pytest.raises(
        ConfigError, match=r"kvcached\.driver='other': this engine runs on cpu, expected host or"
    ):
        driver_name("other", "cpu", plugins)


@pytest.mark.parametrize(
    ("wanted", "device_type", "expected"), [("host", "cuda", "cuda"), ("cuda", "cpu", "host")]
)
def test_a_driver_for_another_kind_is_refused(wanted: str, device_type: str, expected: str) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"kvcached\.driver='{wanted}': this engine runs on {device_type}, expected {expected} or auto",
    ):
        driver_name(wanted, device_type, manager())


def test_on_the_host_an_engine_gets_its_part_of_the_memory() -> None:
    driver = open_for_engine(Config(host_capacity=Size(64 * MIB)), "cpu")
    assert driver.name == "host" and driver.memory().total_bytes == 64 * MIB
    driver.close()
