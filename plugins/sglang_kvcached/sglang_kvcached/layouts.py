"""The layout of a token's keys and values: `engine` as in stock, `layer` or `block`.

With `layer` a token's keys and values of one layer are adjacent, so rows of either buffer are two rows apart.
With `block` a token's keys and values of all layers are adjacent, so rows are 2 * layers rows apart.
docs/sglang.md says how each attention backend reads such buffers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kvcached_core.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

# These, and the kernels that store keys and values for them, use the buffers' strides and copy nothing.
STRIDED_BACKENDS = frozenset({"triton", "flashinfer", "fa3", "torch_native"})
# With these, engines gave stock's answers in every layout (triton on a GPU); others must be asked for.
PROVEN_BACKENDS = frozenset({"torch_native", "triton"})
DEFAULT = "block"


def chosen(layout: str, backends: Iterable[str | None], has_amx_kernels: bool) -> str:
    """Return `block`, `layer` or `engine`; `layout` is the setting of that name.

    Raises UnsupportedError, with the backend's name, for a layout that the backend is not known to read.
    """
    if layout == "engine":
        return layout
    is_asked_for = layout != "auto"
    unproven = sorted(
        {str(name) for name in backends} - (STRIDED_BACKENDS if is_asked_for else PROVEN_BACKENDS)
    )
    if has_amx_kernels:
        unproven.append("the AMX kernels that store keys and values")
    if not unproven:
        return layout if is_asked_for else DEFAULT
    if is_asked_for:
        raise UnsupportedError(
            f"--kv-cache-backend kvcached: KVCACHED_LAYOUT={layout}: this layout is not supported with "
            f"{' and '.join(unproven)}: unset it, or choose one of "
            f"--attention-backend {', '.join(sorted(STRIDED_BACKENDS))}"
        )
    _log.info(
        "kvcached: keys and values have separate buffers: other layouts are not proven with %s",
        " and ".join(unproven),
    )
    return "engine"


def buffers(rows: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the keys and the values of each layer, as views.

    `rows` are tensors of shape (slots, layers, 2, heads, size), where 2 stands for key and value.
    """
    keys, values = (
        [tensor[:, layer, which] for tensor in rows for layer in range(tensor.shape[1])] for which in (0, 1)
    )
    return keys, values
