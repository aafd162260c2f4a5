"""Checks that the installed SGLang has every name that this plugin relies on."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from kvcached_core.errors import UnsupportedError
from kvcached_core.seams import Seam, VersionGate, dotted, missing
from sglang_kvcached.seam_list import COMMAND_LINE, SEAMS

__all__ = ["COMMAND_LINE", "SEAMS", "Seam", "missing", "require"]

VERSIONS = VersionGate("sglang-kvcached", "SGLang", oldest=(0, 5, 23), newest_tested=(0, 5, 23))

_log = logging.getLogger(__name__)


def sglang_version() -> str:
    """Return the version of the installed SGLang; raises UnsupportedError if there is none."""
    try:
        return version("sglang")
    except PackageNotFoundError as error:
        raise UnsupportedError("sglang-kvcached needs SGLang, which is not installed") from error


def require(seams: Iterable[Seam] | None = None) -> None:
    """Raise UnsupportedError, with every difference named, unless the installed SGLang can be used."""
    installed = sglang_version()
    if problem := VERSIONS.problem(installed):
        raise UnsupportedError(problem)
    problems = [problem for seam in (SEAMS if seams is None else seams) if (problem := missing(seam))]
    if problems:
        raise UnsupportedError(
            f"SGLang {installed} does not fit this sglang-kvcached: {'; '.join(problems)}. "
            f"Use a version from {dotted(VERSIONS.oldest)} to {dotted(VERSIONS.newest_tested)}, upgrade "
            f"sglang-kvcached, or start without --kv-cache-backend kvcached and ENABLE_KVCACHED"
        )


def warn_if_newer() -> None:
    """Log a warning if SGLang is newer than the newest tested version."""
    VERSIONS.warn_if_newer(sglang_version(), _log)
