"""How the keys and values of a token lie: as in stock, those of a layer together, or all of them together.

With `layer` a row of the keys is followed by one of the values: rows of either buffer are twice a row apart.
With `block` all that a token has is one row, and rows of a layer's buffer are as far apart as that is long.
docs/sglang.md says how each attention backend was found to read that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kvcached_core.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

# They, and what stores keys and values for them, go by the buffers' own strides and copy nothing.
STRIDED_BACKENDS = frozenset({"triton", "flashinfer", "fa3", "torch_native"})
# With them engines gave stock's answers that way, triton on a GPU; the others have it where it is asked for.
PROVEN_BACKENDS = frozenset({"torch_native", "triton"})
DEFAULT = "block"


def chosen(layout: str, backends: Iterable[str | None], has_amx_kernels: bool) -> str:
    """Return `block`, `layer` or `engine`; `layout` is the setting of that name.

    Raises UnsupportedError, with the backend's name, where what was asked for is not known to be read.
    """
    if layout == "engine":
        return layout
    is_asked_for = layout != "auto"
    strangers = sorted(
        {str(name) for name in backends} - (STRIDED_BACKENDS if is_asked_for else PROVEN_BACKENDS)
    )
    if has_amx_kernels:
        strangers.append("the AMX kernels that store keys and values")
    if not strangers:
        return layout if is_asked_for else DEFAULT
    if is_asked_for:
        raise UnsupportedError(
            f"--kv-cache-backend kvcached: KVCACHED_LAYOUT={layout}: keys and values cannot lie together for "
            f"{' and '.join(strangers)}: leave it out, or choose one of "
            f"--attention-backend {', '.join(sorted(STRIDED_BACKENDS))}"
        )
    _log.info(
        "kvcached: keys and values have lanes of their own: lying together is not proven for %s",
        " and ".join(strangers),
    )
    return "engine"


def buffers(lanes: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the keys and the values of each layer, as views.

    A lane is (slots, layers, 2, heads, size): for each slot the keys and values of its layers.
    """
    keys, values = (
        [lane[:, layer, which] for lane in lanes for layer in range(lane.shape[1])] for which in (0, 1)
    )
    return keys, values
