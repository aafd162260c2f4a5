"""Granules and page sizes."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvcached_core.errors import UnsupportedError
from kvcached_core.geometry import Geometry, choose_page_bytes, make_geometry
from kvcached_core.units import GIB, KIB, MIB

UNIT = 2 * MIB


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Return geometries with small numbers, in which blocks cross page boundaries in every way."""
    unit = draw(st.sampled_from([1, 4, 16]))
    page = unit * draw(st.integers(1, 24))
    stride = draw(st.integers(1, 48))
    block_count = draw(st.integers(1, 60))
    segments = draw(st.integers(1, 3))
    span = -(-block_count * stride // unit) * unit
    try:
        return make_geometry(page, stride, [i * span for i in range(segments)], block_count, unit)
    except UnsupportedError:
        assume(False)
        raise


@given(geometries())
def test_a_granules_blocks_lie_wholly_in_its_page(geometry: Geometry) -> None:
    for granule in range(geometry.granule_count):
        low, high = granule * geometry.page_bytes, (granule + 1) * geometry.page_bytes
        blocks = geometry.blocks(granule)
        assert len(blocks) == geometry.blocks_per_granule >= 1
        assert blocks[0] == geometry.first_block(granule)
        assert low <= blocks[0] * geometry.stride_bytes
        assert (blocks[-1] + 1) * geometry.stride_bytes <= high
        assert {geometry.granule_of(block) for block in blocks} == {granule}


@given(geometries())
def test_a_block_is_in_at_most_one_granule_and_exists(geometry: Geometry) -> None:
    blocks = [block for granule in range(geometry.granule_count) for block in geometry.blocks(granule)]
    assert len(blocks) == len(set(blocks))
    assert set(blocks) <= set(range(geometry.block_count))
    assert 0 in geometry.blocks(0), "I7: the null block is in granule 0"


@given(geometries())
def test_pages_are_disjoint_and_cover_whole_blocks_only(geometry: Geometry) -> None:
    pages = sorted(offset for g in range(geometry.granule_count) for offset in geometry.ranges(g))
    assert all(after - before >= geometry.page_bytes for before, after in itertools.pairwise(pages))
    per_page = geometry.page_bytes // geometry.stride_bytes
    assert per_page - 1 <= geometry.blocks_per_granule <= per_page
    assert geometry.blocks_per_granule == min(
        sum(
            g * geometry.page_bytes <= b * geometry.stride_bytes
            and (b + 1) * geometry.stride_bytes <= (g + 1) * geometry.page_bytes
            for b in range(geometry.block_count)
        )
        for g in range(geometry.granule_count)
    )
    assert 0 <= geometry.waste < 1
    assert geometry.granule_bytes == geometry.page_bytes * len(geometry.starts)


@pytest.mark.parametrize(
    ("stride", "page", "blocks", "waste"),
    [
        (2 * MIB, 16 * MIB, 8, 0.0),  # Llama-8B: 32 layers of 64 KiB
        (28 * 64 * KIB, 14 * MIB, 8, 0.0),  # a 7B with 28 layers: 14 MiB and 28 MiB fit, 14 is nearer to 16
        (61 * 16 * 576 * 2, 28 * MIB, 25, 0.0426),  # DeepSeek MLA, blocks of 16 tokens
        (61 * 64 * 576 * 2, 30 * MIB, 6, 0.1422),  # DeepSeek MLA, blocks of 64 tokens
    ],
)
def test_one_segment_on_a_device_takes_the_page_of_least_waste(
    stride: int, page: int, blocks: int, waste: float
) -> None:
    block_count = 80 * GIB // stride
    (chosen,) = choose_page_bytes([stride], 1, UNIT, block_count, 1 << 40, exact=False)
    geometry = make_geometry(chosen, stride, [0], block_count, UNIT)
    assert (chosen, geometry.blocks_per_granule) == (page, blocks)
    assert geometry.waste == pytest.approx(waste, abs=1e-4)
    for other in range(8 * MIB, 32 * MIB + 1, UNIT):
        try:
            assert make_geometry(other, stride, [0], block_count, UNIT).waste >= geometry.waste
        except UnsupportedError:
            continue


def test_design_figures_for_mla_count_a_page_that_begins_on_a_block() -> None:
    """Pages do not begin on blocks there, so a granule has one block less than the quotient."""
    stride = 61 * 64 * 576 * 2
    for page, quotient in ((26 * MIB, 6), (16 * MIB, 3)):
        assert page // stride == quotient
        assert make_geometry(page, stride, [0], 80 * GIB // stride, UNIT).blocks_per_granule == quotient - 1
    assert 1 - 6 * stride / (26 * MIB) == pytest.approx(0.01, abs=0.001)
    assert 1 - 3 * stride / (16 * MIB) == pytest.approx(0.20, abs=0.005)


def test_several_segments_on_a_device_take_the_granularity() -> None:
    assert choose_page_bytes([64 * KIB], 32, UNIT, 10_000, 1 << 40, exact=False) == (UNIT,)
    (page,) = choose_page_bytes([3 * MIB], 32, UNIT, 10_000, 1 << 40, exact=False)
    assert page == 6 * MIB  # in 4 MiB, the second granule would hold no whole block
    assert make_geometry(page, 3 * MIB, [0], 10_000, UNIT).blocks_per_granule >= 1


def test_a_block_larger_than_the_usual_pages_gets_a_page_that_holds_it() -> None:
    (page,) = choose_page_bytes([40 * MIB], 1, UNIT, 1000, 1 << 40, exact=False)
    assert page == 40 * MIB


@given(
    strides=st.lists(st.integers(1, 64).map(lambda n: n * 512), min_size=1, max_size=4),
    segments=st.integers(1, 64),
    block_count=st.integers(1000, 200_000),
    max_mappings=st.integers(10_000, 40_000),
)
def test_host_pages_waste_nothing_and_stay_below_the_mapping_limit(
    strides: list[int], segments: int, block_count: int, max_mappings: int
) -> None:
    try:
        pages = choose_page_bytes(strides, segments, 4096, block_count, max_mappings, exact=True)
    except UnsupportedError:
        unit = math.lcm(*(4096 // math.gcd(4096, stride) for stride in strides))
        assert block_count < max(unit, -(-block_count * segments // max_mappings) + unit)
        return
    counts = {page // stride for page, stride in zip(pages, strides, strict=True)}
    assert len(counts) == 1, "a granule holds as many blocks on every rank"
    for page, stride in zip(pages, strides, strict=True):
        geometry = make_geometry(page, stride, [0], block_count, 4096)
        assert geometry.waste == 0
        assert geometry.granule_count * segments <= max_mappings


def test_host_granules_are_about_a_mebibyte() -> None:
    assert choose_page_bytes([16 * KIB], 4, 4096, 100_000, 32_000, exact=True) == (256 * KIB,)
    assert choose_page_bytes([18432], 61, 4096, 1000, 32_000, exact=True) == (36864,)
    # 10,000 blocks in 61 segments: pages of 20 blocks keep to 32,000 mappings
    assert choose_page_bytes([18432], 61, 4096, 10_000, 32_000, exact=True) == (20 * 18432,)


def test_a_small_arena_has_a_granule() -> None:
    assert choose_page_bytes([4096], 1, 4096, 10, 32_000, exact=True) == (40960,)
    assert choose_page_bytes([UNIT], 1, UNIT, 3, 1 << 40, exact=False) == (UNIT,)


def test_ranks_with_different_strides_share_the_number_of_blocks() -> None:
    pages = choose_page_bytes([3 * MIB // 2, MIB], 1, UNIT, 10_000, 1 << 40, exact=False)
    assert pages == (18 * MIB, 12 * MIB)
    with pytest.raises(UnsupportedError, match="blocks alike"):
        choose_page_bytes([61 * 18432, 60 * 18432], 1, UNIT, 10_000, 1 << 40, exact=False)


def test_a_wanted_page_is_taken_or_refused_with_what_is_legal() -> None:
    assert choose_page_bytes([UNIT], 1, UNIT, 1000, 1 << 40, False, 64 * MIB) == (64 * MIB,)
    with pytest.raises(UnsupportedError, match=f"multiple of {UNIT} bytes"):
        choose_page_bytes([UNIT], 1, UNIT, 1000, 1 << 40, False, 3 * MIB)
    assert choose_page_bytes([6144], 2, 4096, 1000, 30_000, True, 24576) == (24576,)
    assert choose_page_bytes([6144], 2, 4096, 1000, 30_000, True, 8192) == (8192,), "a straddler is allowed"
    with pytest.raises(UnsupportedError, match="multiple of 4096 bytes"):
        choose_page_bytes([6144], 2, 4096, 1000, 30_000, True, 9000)
    with pytest.raises(UnsupportedError, match="multiple of 12288 bytes"):
        choose_page_bytes([6144, 12288], 2, 4096, 1000, 30_000, True, 8192)
    with pytest.raises(UnsupportedError, match="a segment has 1000"):
        choose_page_bytes([4096, 8192], 1, 4096, 1000, 30_000, True, 4096 * 1001)


@pytest.mark.parametrize(
    ("page", "stride", "starts", "blocks", "text"),
    [
        (3 * MIB, MIB, [0], 100, "page 3145728 bytes"),
        (0, MIB, [0], 100, "page 0 bytes"),
        (UNIT, MIB, [MIB], 100, "start of a segment 1048576 bytes"),
        (UNIT, MIB, [0, 50 * MIB], 100, "overlap"),
        (UNIT, 3 * MIB, [0], 100, "holds no whole block"),
        (UNIT, MIB, [0], 1, "holds no whole block"),
    ],
)
def test_a_geometry_that_the_driver_cannot_serve_is_refused_with_numbers(
    page: int, stride: int, starts: list[int], blocks: int, text: str
) -> None:
    with pytest.raises(UnsupportedError, match=text):
        make_geometry(page, stride, starts, blocks, UNIT)


def test_describe_says_page_granule_and_waste() -> None:
    text = make_geometry(16 * MIB, UNIT, [0], 1000, UNIT).describe()
    assert text == ("page 16 MiB, 1 segment(s), granule 16 MiB = 8 blocks of 2 MiB, 125 granules, waste 0.0%")
