"""Whether all that a token has lies together: keys and values of all layers in one row, or lanes as in stock.

By token, two rows of a layer's buffer are as far apart as keys and values of all layers are long: that is its
stride(0). docs/sglang.md says how each attention backend was found to read that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from kvcached_core.errors import UnsupportedError

_log = logging.getLogger(__name__)

# They, and what stores keys and values for them, go by the buffers' own strides and copy nothing.
STRIDED_BACKENDS = frozenset({"triton", "flashinfer", "fa3", "torch_native"})
# With them engines gave stock's answers that way, triton on a GPU; the others have it where it is asked for.
PROVEN_BACKENDS = frozenset({"torch_native", "triton"})


def by_token(layout: str, backends: Iterable[str | None], has_amx_kernels: bool) -> bool:
    """Say whether all that a token has is to lie together; `layout` is the setting of that name.

    Raises UnsupportedError, with the backend's name, where that was asked for and is not known to be read.
    """
    if layout == "engine":
        return False
    known = STRIDED_BACKENDS if layout == "block" else PROVEN_BACKENDS
    strangers = sorted({str(name) for name in backends} - known)
    if has_amx_kernels:
        strangers.append("the AMX kernels that store keys and values")
    if not strangers:
        return True
    if layout == "block":
        raise UnsupportedError(
            "--kv-cache-backend kvcached: KVCACHED_LAYOUT=block: a token's layers cannot lie together for "
            f"{' and '.join(strangers)}: leave it out, or choose one of "
            f"--attention-backend {', '.join(sorted(STRIDED_BACKENDS))}"
        )
    _log.info(
        "kvcached: keys and values have lanes of their own: layers by token are not proven for %s",
        " and ".join(strangers),
    )
    return False
