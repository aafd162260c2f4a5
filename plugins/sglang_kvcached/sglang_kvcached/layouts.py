"""Whether the keys and values of a token lie side by side: in one lane of a layer, or each in its own.

Side by side, a row of either buffer is followed by the other's: stride(0) is twice a row. docs/sglang.md says
how each attention backend was found to read that.
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


def side_by_side(layout: str, backends: Iterable[str | None], has_amx_kernels: bool) -> bool:
    """Say whether keys and values are to lie side by side; `layout` is the setting of that name.

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
            "--kv-cache-backend kvcached: KVCACHED_LAYOUT=block: keys and values cannot lie side by side for "
            f"{' and '.join(strangers)}: leave it out, or choose one of "
            f"--attention-backend {', '.join(sorted(STRIDED_BACKENDS))}"
        )
    _log.info(
        "kvcached: keys and values have lanes of their own: side by side is not proven for %s",
        " and ".join(strangers),
    )
    return False
