"""Settings are read once and checked; an error names the option and its legal values."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from kvcached_core.config import OPTIONS, SWITCH_VARIABLE, Config, enabled, explain, load
from kvcached_core.errors import ConfigError
from kvcached_core.foreign_settings import other_package_variables
from kvcached_core.units import MIB, Size

LEGAL: dict[str, list[tuple[Any, Any]]] = {
    "runtime_dir": [("/run/kvcached", "/run/kvcached")],
    "name": [("llama", "llama")],
    "driver": [("host", "host")],
    "host_capacity": [("4GiB", Size(4 << 30)), ("50%", Size(percent=50.0))],
    "limit": [("20%", Size(percent=20.0)), (1 << 30, Size(1 << 30))],
    "floor": [("auto", None), ("1GiB", Size(1 << 30)), ("0", Size(0))],
    "weight": [("1", 1), (1_000_000, 1_000_000)],
    "virtual": [("10GiB", Size(10 << 30))],
    "max_blocks": [("1024", 1024), (1 << 24, 1 << 24)],
    "page_size": [("auto", None), ("32MiB", Size(32 * MIB))],
    "layout": [("engine", "engine"), ("block", "block"), ("layer", "layer"), ("auto", "auto")],
    "headroom": [("0", Size(0))],
    "spare": [("1MiB", Size(MIB))],
    "idle_seconds": [("0", 0.0), (0.5, 0.5), ("86400", 86400.0)],
    "cache_seconds": [("0", 0.0), (3600, 3600.0)],
    "grant_seconds": [("1", 1.0), (0, 0.0)],
    "keep_seconds": [("0", 0.0), (1.5, 1.5), ("3600", 3600.0)],
    "start_seconds": [("0", 0.0), (1.5, 1.5), ("86400", 86400.0)],
    "start_size": [("auto", None), ("8GiB", Size(8 << 30)), (0, Size(0))],
}
ILLEGAL: dict[str, list[Any]] = {
    "host_capacity": ["lots", "101%"],
    "limit": ["-1", "1 elephant", True],
    "floor": ["none", "-1"],
    "weight": ["0", "1000001", "1.5", "heavy", "nan"],
    "virtual": ["-1"],
    "max_blocks": ["1023", str((1 << 24) + 1), "many"],
    "page_size": ["0", "10%", "3 XB", "-2MiB"],
    "layout": ["head", ""],
    "headroom": ["x"],
    "spare": ["x"],
    "idle_seconds": ["-1", "86401", "nan", "inf", "soon"],
    "cache_seconds": ["-1", "inf", "nan", "soon"],
    "grant_seconds": ["-0.1", "1.1", "nan"],
    "keep_seconds": ["-1", "3601", "nan", "soon"],
    "start_seconds": ["-1", "86401", "nan", "soon"],
    "start_size": ["10%", "-1", "much"],
}
CASES = [(name, given, value) for name, pairs in LEGAL.items() for given, value in pairs]
WRONG = [(name, given) for name, all_given in ILLEGAL.items() for given in all_given]


def test_every_option_is_a_field_and_is_tested() -> None:
    names = [option.name for option in OPTIONS]
    assert names == [field.name for field in dataclasses.fields(Config)] == list(LEGAL)


def test_without_settings_the_defaults_hold_and_are_what_is_documented() -> None:
    assert load({}, {}) == Config()
    assert load({option.name: option.default for option in OPTIONS if option.default}, {}) == Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().weight = 3  # type: ignore[misc]


@pytest.mark.parametrize(("name", "given", "value"), CASES)
def test_a_legal_value_is_taken_from_an_option_or_a_variable(name: str, given: Any, value: Any) -> None:
    assert getattr(load({name: given}, {}), name) == value
    assert getattr(load({}, {f"KVCACHED_{name.upper()}": str(given)}), name) == value


@pytest.mark.parametrize(("name", "given"), WRONG)
def test_an_illegal_value_names_itself_and_what_is_legal(name: str, given: Any) -> None:
    legal = next(option.legal for option in OPTIONS if option.name == name)
    with pytest.raises(ConfigError) as from_option:
        load({name: given}, {})
    assert str(from_option.value) == f"kvcached.{name}={str(given)!r}: expected {legal}"
    if given != "":  # an empty variable counts as unset
        variable = f"KVCACHED_{name.upper()}"
        with pytest.raises(ConfigError) as from_variable:
            load({}, {variable: str(given)})
        assert str(from_variable.value) == f"{variable}={str(given)!r}: expected {legal}"


def test_an_option_wins_over_a_variable_and_a_variable_over_the_default() -> None:
    environ = {"KVCACHED_WEIGHT": "7", "KVCACHED_NAME": ""}
    assert load({}, environ).weight == 7 and load({"weight": 9}, environ).weight == 9
    sources = {setting.name: (setting.value, setting.source) for setting in explain(environ, {"limit": "5%"})}
    assert sources["weight"] == ("7", "KVCACHED_WEIGHT")
    assert sources["limit"] == ("5%", "option")
    assert sources["name"] == ("", "default") and sources["spare"] == ("128MiB", "default")
    assert list(sources) == [option.name for option in OPTIONS]


def test_unknown_names_are_refused_by_name_and_the_known_ones_are_told() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown setting KVCACHED_LIMITS, kvcached.speed: known are"
    ) as error:
        load({"speed": 1}, {"KVCACHED_LIMITS": "1", "HOME": "/", "ENABLE_KVCACHED": "1"})
    assert all(option.name in str(error.value) for option in OPTIONS)
    with pytest.raises(ConfigError, match="KVCACHED_PAGESIZE"):
        explain({"KVCACHED_PAGESIZE": "2MiB"})


@pytest.mark.parametrize("variable", other_package_variables())
def test_a_variable_of_the_other_package_is_refused_with_its_name_here(variable: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load({}, {variable: "1"})
    told = str(refused.value)
    assert told.startswith(f"unknown setting {variable}: {variable} ") and "known are" not in told
    named = set(re.findall(r"KVCACHED_[A-Z]+(?:_[A-Z]+)*", told)) - {variable}
    assert named <= {option.variable for option in OPTIONS}
    assert ("has no counterpart here: " in told) or f"{variable} is KVCACHED_" in told


def test_hints_stand_before_the_list_of_all_settings() -> None:
    with pytest.raises(ConfigError, match="KVCACHED_IPC_NAME is KVCACHED_NAME here; known are runtime_dir"):
        load({}, {"KVCACHED_IPC_NAME": "a", "KVCACHED_LIMITS": "1"})


@pytest.mark.parametrize(
    "variable",
    ["KVCACHED_PORT", "KVCACHED_SERVICE_HOST", "KVCACHED_SERVICE_PORT_HTTP", "KVCACHED_PORT_8000_TCP_ADDR",
     "KVCACHED_LLAMA_PORT_8000_TCP", "KVCACHED_LLAMA_SERVICE_PORT"],
)  # fmt: skip
def test_a_variable_that_kubernetes_made_is_refused_with_the_field_that_stops_it(variable: str) -> None:
    with pytest.raises(ConfigError, match=f"{variable} is made by Kubernetes .*enableServiceLinks: false"):
        load({}, {variable: "tcp://10.0.0.1:8000"})


@pytest.mark.parametrize(("text", "on"), [("1", True), ("TRUE", True), ("no", False), ("", False)])
def test_the_switch(text: str, on: bool) -> None:
    assert enabled({SWITCH_VARIABLE: text}) is on
    assert enabled({}) is False


def test_a_switch_that_is_neither_on_nor_off_is_refused() -> None:
    with pytest.raises(ConfigError, match="ENABLE_KVCACHED='banana': expected 1, true, yes or on"):
        enabled({SWITCH_VARIABLE: "banana"})
