"""Variables that begin with KVCACHED_ and are not settings of this project, and what to set instead."""

from __future__ import annotations

import re

PREFIX = "KVCACHED_"
_NONE = "has no counterpart here"

# Variables of PyPI's package kvcached, without their prefix. docs/migrating.md has the same list.
_OTHER_PACKAGE = {
    "IPC_NAME": "is KVCACHED_NAME here",
    "PAGE_SIZE_MB": "is KVCACHED_PAGE_SIZE here, with a unit: 16MiB",
    "GPU_UTILIZATION": "is KVCACHED_LIMIT here, in percent: 95%",
    "MIN_RESERVED_PAGES": "is KVCACHED_SPARE here, a size: 128MiB",
    "MAX_RESERVED_PAGES": "is KVCACHED_SPARE here, a size: 128MiB",
    "PAGE_PREALLOC_ENABLED": "is KVCACHED_SPARE here: 0 keeps no memory ready",
    "CONTIGUOUS_LAYOUT": "is KVCACHED_LAYOUT here: block for true, engine for false",
    "MAX_CACHED_TOKENS": f"{_NONE}: the prefix cache uses memory that no request needs; "
                         "KVCACHED_CACHE_SECONDS bounds its age",
    "MAX_CACHED_BLOCKS": f"{_NONE}: memory of freed pages is given back after KVCACHED_IDLE_SECONDS",
    "AUTOPATCH": f"{_NONE}: start the engine with --kv-cache-backend kvcached or ENABLE_KVCACHED=true",
    "LOG_LEVEL": f"{_NONE}: set the engine's, VLLM_LOGGING_LEVEL or SGLang's --log-level",
    "LOG_COLOR": f"{_NONE}: the engine writes the log",
    "LOG_COLOR_CODE": f"{_NONE}: the engine writes the log",
    "ENGINECORE_NO_CUDA": f"{_NONE}: no scheduler here opens the device",
    "MEMINFO_QUERY_TIMEOUT": f"{_NONE}: no engine here polls for free memory",
    "MEMINFO_REFRESH_INTERVAL": f"{_NONE}: no engine here polls for free memory",
    "SANITY_CHECK": f"{_NONE}: run kvctl check",
}  # fmt: skip
_SERVICE = re.compile(r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")


def advice(variable: str) -> str | None:
    """Return a sentence on a variable of another program; None if the variable is not known.

    Known are the variables of PyPI's package kvcached, and those that Kubernetes makes from the names of
    Services.
    """
    name = variable.removeprefix(PREFIX)
    if name in _OTHER_PACKAGE:
        return f"{variable} {_OTHER_PACKAGE[name]}"
    if _SERVICE.fullmatch(name):
        return (
            f"{variable} is made by Kubernetes for a Service whose name begins with kvcached: "
            "set enableServiceLinks: false in the pod"
        )
    return None


def other_package_variables() -> tuple[str, ...]:
    """Return the variables of PyPI's package kvcached that `advice` knows."""
    return tuple(PREFIX + name for name in _OTHER_PACKAGE)
