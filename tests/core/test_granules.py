"""Granules against a plain model: the state of each block and the moves of each granule."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kvcached_core.errors import InvariantError
from kvcached_core.scheduler.granules import Granules

# (page, stride) in bytes: no waste; a block across every page boundary, across some; one block a page.
PAGES = [(32, 8), (10, 4), (14, 4), (16, 5), (16, 16), (100, 9)]


@dataclass
class Block:
    """The one attribute of a block that granules use."""

    block_id: int


def make(count: int, size: int, budget: int) -> tuple[list[Block], Granules[Block]]:
    """Return `count` granules without waste, all of which may be mapped up to the budget."""
    blocks = [Block(index) for index in range(count * size)]
    granules = Granules(blocks, range(0, count * size, size), size)
    granules.set_budget(budget)
    return blocks, granules


def test_i2_over_the_budget_nothing_is_free_and_what_is_mapped_only_falls() -> None:
    _, granules = make(8, 4, 8)
    taken = granules.take(granules.free_blocks)
    granules.set_budget(3)
    assert (granules.free_blocks, granules.mapped) == (0, 8)
    granules.free(taken[-6:])  # granule 7, and half of granule 6
    assert granules.free_blocks == 6
    assert len(granules.take(6)) == 6 and granules.mapped == 8, (
        "what came back inside a step may be taken again"
    )
    granules.free(taken[-6:])
    granules.shrink(3, lambda cached: pytest.fail("nothing is cached"))
    granules.set_budget(3)
    assert (granules.free_blocks, granules.mapped) == (0, 7)
    assert granules.mapped_set.take_change() == ((), tuple(range(1, 7)))
    granules.free([block for block in taken[:-6] if block.block_id >= 12])
    granules.shrink(3, lambda cached: pytest.fail("nothing is cached"))
    granules.set_budget(3)
    assert (granules.free_blocks, granules.mapped, granules.take(1)) == (0, 3, [])
    assert granules.mapped_set.take_change().unmap == (3, 4, 5, 6)
    granules.check()


def test_a_granule_that_comes_and_goes_between_two_plans_is_in_neither_list() -> None:
    _, granules = make(4, 2, 4)
    granules.free(granules.take(7))
    granules.shrink(2, lambda cached: None)
    assert granules.mapped_set.take_change() == ((), (1,))
    granules.shrink(1, lambda cached: None)
    granules.set_budget(2)
    granules.take(3)
    assert granules.mapped_set.take_change() == ((), ()), (
        "unmapped and mapped again: the worker need not know"
    )


def test_the_lowest_granule_is_filled_first_so_that_high_ones_can_be_given_up() -> None:
    blocks, granules = make(6, 4, 6)
    granules.take(23)
    granules.free([blocks[22], blocks[9], blocks[5], blocks[13]])
    assert [block.block_id for block in granules.take(3)] == [5, 9, 13]


@pytest.mark.parametrize(("first_blocks", "size"), [([], 4), ([1, 5], 4), ([0, 4], 0)])
def test_granule_0_begins_with_block_0(first_blocks: list[int], size: int) -> None:
    with pytest.raises(InvariantError, match="block 0"):
        Granules([Block(index) for index in range(9)], first_blocks, size)


@pytest.mark.parametrize(
    "damage",
    [
        "clean_blocks",
        "free_blocks",
        "_empties.count",
        "_used",
        "_idle",
        "_open",
        "_empties._heap",
        "mapped_set.mapped",
    ],
)
def test_check_sees_what_does_not_add_up(damage: str) -> None:
    _, granules = make(4, 4, 4)
    taken = granules.take(10)
    granules.lend(taken[-3:])
    granules.check()
    owner, _, name = damage.rpartition(".")
    target = getattr(granules, owner) if owner else granules
    value = getattr(target, name)
    if isinstance(value, int):
        setattr(target, name, value + 1)
    elif isinstance(value, dict):
        value[0] = 0.0
    elif name == "_used":
        value[1] += 1
    else:
        value.clear()
        granules.free(taken[:-3])
        value.clear()
    with pytest.raises(InvariantError, match="do not add up"):
        granules.check()
