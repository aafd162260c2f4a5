"""A name of an engine that a plugin relies on, and whether the installed engine has it."""

from __future__ import annotations

import importlib
import inspect
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
