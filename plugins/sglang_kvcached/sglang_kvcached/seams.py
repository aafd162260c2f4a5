"""Checks that the installed SGLang has every name that this plugin relies on."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from kvcached_core.errors import UnsupportedError
from kvcached_core.seams import Seam, missing
from sglang_kvcached.seam_list import COMMAND_LINE, SEAMS

__all__ = ["COMMAND_LINE", "SEAMS", "Seam", "missing", "require"]

OLDEST, NEWEST_TESTED = (0, 5, 23), (0, 5, 23)

_log = logging.getLogger(__name__)


def sglang_version() -> str:
    """Return the version of the installed SGLang; raises UnsupportedError if there is none."""
    try:
        return version("sglang")
    except PackageNotFoundError as error:
        raise UnsupportedError("sglang-kvcached needs SGLang, which is not installed") from error


def version_problem(text: str) -> str:
    """Say why a version of SGLang cannot be used, or return an empty text."""
    found = _numbers(text)
    if found and found < OLDEST:
        return (
            f"sglang-kvcached needs SGLang {_dotted(OLDEST)} or newer, and {text} is installed: upgrade "
            f"SGLang, or start without --kv-cache-backend kvcached and ENABLE_KVCACHED"
        )
    return ""


def require(seams: Iterable[Seam] | None = None) -> None:
    """Raise UnsupportedError, with every difference named, unless the installed SGLang can be used."""
    installed = sglang_version()
    if problem := version_problem(installed):
        raise UnsupportedError(problem)
    problems = [problem for seam in (SEAMS if seams is None else seams) if (problem := missing(seam))]
    if problems:
        raise UnsupportedError(
            f"SGLang {installed} does not fit this sglang-kvcached: {'; '.join(problems)}. "
            f"Use a version from {_dotted(OLDEST)} to {_dotted(NEWEST_TESTED)}, upgrade sglang-kvcached, or "
            f"start without --kv-cache-backend kvcached and ENABLE_KVCACHED"
        )


def warn_if_newer() -> None:
    """Log a warning if SGLang is newer than the newest tested version."""
    installed = sglang_version()
    if _numbers(installed) > NEWEST_TESTED:
        _log.warning(
            "SGLang %s is newer than %s, the newest sglang-kvcached was tested with; every seam it uses is "
            "there", installed, _dotted(NEWEST_TESTED),
        )  # fmt: skip


def _numbers(text: str) -> tuple[int, ...]:
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, match.groups())) if match else ()


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
