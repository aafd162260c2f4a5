"""Sizes and switches as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_core.units import GIB, KIB, MIB, Size, format_size, parse_size, parse_switch


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", Size(0)), ("4096", Size(4096)), (4096, Size(4096)), ("16MiB", Size(16 * MIB)),
        (" 16 mib ", Size(16 * MIB)), ("16M", Size(16 * MIB)), ("16MB", Size(16 * MIB)),
        ("2g", Size(2 * GIB)),
        ("1.5KiB", Size(1536)), ("3b", Size(3)), ("1TiB", Size(1 << 40)), ("50%", Size(percent=50.0)),
        ("0.5 %", Size(percent=0.5)), ("100%", Size(percent=100.0)),
        (str((1 << 62) - 1), Size((1 << 62) - 1)),
    ],
)  # fmt: skip
def test_a_size_is_read_in_powers_of_1024(text: str | int, size: Size) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MiB",
        "-1",
        "1 2",
        "1e3",
        "0x10",
        "1..5",
        ".5",
        "3 XB",
        "101%",
        "1%%",
        "nan",
        "inf",
        "1,5G",
        str(1 << 62),
        "4194304T",
    ],
)
def test_what_is_no_size_is_refused_with_what_is_legal(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_size(text)


@given(st.integers(0, (1 << 62) - 1))
def test_plain_bytes_are_exact(size_bytes: int) -> None:
    assert parse_size(str(size_bytes)) == Size(size_bytes)
    assert parse_size(size_bytes).of(1) == size_bytes


@given(st.integers(1, 1 << 50))
def test_a_size_for_people_reads_back_within_a_half_percent(size_bytes: int) -> None:
    text = format_size(size_bytes)
    assert abs(parse_size(text).bytes - size_bytes) <= size_bytes * 0.005 + 1, "and a byte"


def test_sizes_for_people_have_the_largest_unit_and_no_idle_digits() -> None:
    sizes = (0, 1023, KIB, 1536, 100 * MIB, int(1.25 * GIB), 10 << 40, -3 * MIB)
    assert [format_size(size) for size in sizes] == [
        "0 B", "1023 B", "1 KiB", "1.5 KiB", "100 MiB", "1.25 GiB", "10 TiB", "-3 MiB",
    ]  # fmt: skip


def test_a_share_is_of_a_total() -> None:
    assert Size(percent=25.0).of(1000) == 250
    assert Size(percent=33.0).of(10) == 3, "rounded down: never more than the share"
    assert Size(77).of(10) == 77
    assert (str(Size(percent=12.5)), str(Size(2 * MIB))) == ("12.5%", "2 MiB")


@pytest.mark.parametrize("word", ["1", "true", "TRUE", "yes", "On", " on ", True, 1])
def test_words_that_mean_on(word: str | bool | int) -> None:
    assert parse_switch(word) is True


@pytest.mark.parametrize("word", ["0", "false", "No", "off", "", "  ", False, 0])
def test_words_that_mean_off(word: str | bool | int) -> None:
    assert parse_switch(word) is False


@pytest.mark.parametrize("word", ["2", "banana", "truee", "enabled", "-1", "None"])
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match="expected 1, true, yes or on"):
        parse_switch(word)
