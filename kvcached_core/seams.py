"""The names and versions of an engine that a plugin relies on, and whether the installed engine has them."""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from typing import Any, NamedTuple


class Seam(NamedTuple):
    """A name in an engine. It must accept `parameters`; `kind`: function, class, attribute of an object."""

    module: str
    qualname: str
    parameters: tuple[str, ...] = ()
    kind: str = "function"


def missing(seam: Seam) -> str:
    """Say what is wrong with a seam in the installed engine, or return an empty text."""
    try:
        target: Any = importlib.import_module(seam.module)
    except ImportError as error:
        return f"{seam.module} cannot be imported: {error}"
    if seam.kind == "attribute":
        return ""  # set by __init__ or a dataclass: checked in the source by the compatibility tests
    for name in seam.qualname.split("."):
        target = getattr(target, name, None)
        if target is None:
            return f"{seam.module} has no {seam.qualname}"
    if seam.kind == "class" and not seam.parameters:
        return ""
    accepted = inspect.signature(target).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values()):
        return ""
    absent = [name for name in seam.parameters if name not in accepted]
    return f"{seam.module}.{seam.qualname} does not take {', '.join(absent)}" if absent else ""


class VersionGate(NamedTuple):
    """The versions of an engine that a plugin can use, compared by as many numbers as `oldest` has."""

    plugin: str
    engine: str
    oldest: tuple[int, ...]
    newest_tested: tuple[int, ...]

    def problem(self, version: str) -> str:
        """Say why a version of the engine cannot be used, or return an empty text."""
        found = self._numbers(version)
        if found and found < self.oldest:
            return (
                f"{self.plugin} needs {self.engine} {dotted(self.oldest)} or newer, and {version} is "
                f"installed: upgrade {self.engine}, or start without --kv-cache-backend kvcached and "
                "ENABLE_KVCACHED"
            )
        return ""

    def is_newer(self, version: str) -> bool:
        """Say whether a version is newer than every tested one."""
        return self._numbers(version) > self.newest_tested

    def warn_if_newer(self, version: str, log: logging.Logger) -> None:
        """Log a warning if the version is newer than every tested one; every seam has been found before."""
        if self.is_newer(version):
            log.warning(
                "%s %s is newer than %s, the newest %s was tested with; every seam it uses is there",
                self.engine, version, dotted(self.newest_tested), self.plugin,
            )  # fmt: skip

    def _numbers(self, version: str) -> tuple[int, ...]:
        """Return the first numbers of a version, as many as `oldest` has; () if it has fewer."""
        match = re.match(r"\.".join([r"(\d+)"] * len(self.oldest)), version)
        return tuple(map(int, match.groups())) if match else ()


def dotted(numbers: tuple[int, ...]) -> str:
    """Write the numbers of a version."""
    return ".".join(map(str, numbers))
