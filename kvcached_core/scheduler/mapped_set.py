"""Which granules are mapped, and what changed since the last plan."""

from __future__ import annotations

from typing import NamedTuple

from kvcached_core.errors import InvariantError
from kvcached_core.vacancies import Vacancies


class PlanChange(NamedTuple):
    """Granules to unmap and to map since the last change was taken; disjoint and sorted."""

    unmap: tuple[int, ...]
    map: tuple[int, ...]


class MappedSet:
    """The mapped ones of `count` granules; the lowest that is not mapped is mapped next."""

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
        """Return what changed since the last call; a granule that came and went is in neither list."""
        change = PlanChange(tuple(sorted(self._to_unmap)), tuple(sorted(self._to_map)))
        self._to_unmap.clear()
        self._to_map.clear()
        return change

    @property
    def changed(self) -> bool:
        """Say whether `take_change` would return anything."""
        return bool(self._to_map or self._to_unmap)

    @property
    def gives_back(self) -> bool:
        """Say whether the next change unmaps anything."""
        return bool(self._to_unmap)

    def granules(self) -> list[int]:
        """Return all mapped granules, sorted; looks at all."""
        return self._vacancies.taken()

    def check(self) -> None:
        """Raise InvariantError unless everything adds up; looks at all granules."""
        mapped = set(self.granules())
        wrong = {
            "mapped": self.mapped != len(mapped) or self.mapped > self.count,
            "unmapped twice": self._vacancies.has_duplicates,
            "mapped and in the plan to unmap": bool(mapped & self._to_unmap),
            "unmapped and in the plan to map": bool(self._to_map - mapped),
        }
        if any(wrong.values()):
            raise InvariantError(f"mapped granules do not add up: {[name for name in wrong if wrong[name]]}")
