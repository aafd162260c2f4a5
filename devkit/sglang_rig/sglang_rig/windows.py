"""Torch-native attention that reads a sliding window's own pool by that pool's numbers; SGLang's does not."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend


class WindowsBackend(TorchNativeAttnBackend):  # type: ignore[misc]
    """As SGLang's own for layers that see all tokens; for others slots are translated first."""

    def _slots(self, req_to_token: torch.Tensor, window: int | None) -> torch.Tensor:
        if window is None or not self.use_sliding_window_kv_pool:
            return req_to_token
        translated: torch.Tensor = self.token_to_kv_pool.translate_loc_from_full_to_swa(req_to_token)
        return translated

    def _run_sdpa_forward_extend(
        self, query: Any, output: Any, k: Any, v: Any, req_to_token: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        slots = self._slots(req_to_token, more.get("sliding_window_size"))
        return super()._run_sdpa_forward_extend(query, output, k, v, slots, *rest, **more)

    def _run_sdpa_forward_decode(
        self, query: Any, output: Any, k: Any, v: Any, req_to_token: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        slots = self._slots(req_to_token, more.get("sliding_window_size"))
        return super()._run_sdpa_forward_decode(query, output, k, v, slots, *rest, **more)
