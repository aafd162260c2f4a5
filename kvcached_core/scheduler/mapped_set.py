"""The mapped granules, and the changes since the last plan."""

from __future__ import annotations

from typing import NamedTuple

from kvcached_core.errors import InvariantError
from kvcached_core.vacancies import Vacancies


class PlanChange(NamedTuple):
    """Granules to unmap and to map with the next plan: disjoint, and each sorted."""

    unmap: tuple[int, ...]
    map: tuple[int, ...]


class MappedSet:
    """The mapped granules among `count`. The lowest unmapped granule is mapped next."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.mapped = 0
        self._vacancies = Vacancies(0, count)
        self._to_map: set[int] = set()
        self._to_unmap: set[int] = set()

    def map_lowest(self) -> int:
        """Map the lowest granule that is not mapped and return it; there must be one."""
        granule = self._vacancies.take_lowest()
        self.mapped += 1
        if granule in self._to_unmap:
            self._to_unmap.remove(granule)
        else:
            self._to_map.add(granule)
        return granule

    def unmap(self, granule: int) -> None:
        """Unmap a mapped granule."""
        self._vacancies.add(granule)
        self.mapped -= 1
        if granule in self._to_map:
            self._to_map.remove(granule)
        else:
            self._to_unmap.add(granule)

    def take_change(self) -> PlanChange:
        """Return the changes since the last call, without those that cancel out."""
        change = PlanChange(tuple(sorted(self._to_unmap)), tuple(sorted(self._to_map)))
        self._to_unmap.clear()
        self._to_map.clear()
        return change

    @property
    def changed(self) -> bool:
        """Say whether a granule changed since the last `take_change`."""
        return bool(self._to_map or self._to_unmap)

    @property
    def gives_back(self) -> bool:
        """Say whether the next change unmaps a granule."""
        return bool(self._to_unmap)

    def granules(self) -> list[int]:
        """Return all mapped granules, sorted. Looks at all of them."""
        return self._vacancies.taken()

    def check(self) -> None:
        """Raise InvariantError unless the sets and counts agree. Looks at all granules."""
        mapped = set(self.granules())
        wrong = {
            "mapped": self.mapped != len(mapped) or self.mapped > self.count,
            "unmapped twice": self._vacancies.has_duplicates,
            "mapped and in the plan to unmap": bool(mapped & self._to_unmap),
            "unmapped and in the plan to map": bool(self._to_map - mapped),
        }
        if any(wrong.values()):
            raise InvariantError(f"mapped granules do not add up: {[name for name in wrong if wrong[name]]}")
