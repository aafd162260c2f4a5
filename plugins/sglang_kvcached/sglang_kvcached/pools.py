"""SGLang's pools over elastic memory: buffers have stock's shapes, and only mapped granules have memory."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from kvcached_core.errors import UnsupportedError
from kvcached_core.units import GIB, format_size
from sglang_kvcached import layouts, process_state
from sglang_kvcached.buffer_spec import BufferSpec
from sglang_kvcached.rank_memory import Reservation

_log = logging.getLogger(__name__)


class ReservedBuffers:
    """Mixin that makes a pool's buffers over reserved addresses; a draft model's pool stays stock."""

    kv_reservation: Reservation | None = None
    _stock_usage: float = 0.0
    kv_cache_layout = "nhd"
    store_dtype: torch.dtype

    @property
    def mem_usage(self) -> float:
        """Memory held now, in GiB. SGLang shows it as the size of its KV cache."""
        reservation = self.kv_reservation
        return self._stock_usage if reservation is None else reservation.rank_memory.held_bytes / GIB

    @mem_usage.setter
    def mem_usage(self, usage: float) -> None:
        self._stock_usage = usage

    @property
    def _is_one_of_two(self) -> bool:
        """Say whether this is one of a model's two pools."""
        return getattr(self, "allocation_label", None) is not None

    def _reserve(self, shape: tuple[int, ...], count: int, page_size: int) -> list[torch.Tensor]:
        """Return `count` buffers of `shape`; only their first granule has memory."""
        rows, dtype = shape[0], self.store_dtype
        spec = BufferSpec(count, rows, math.prod(shape[1:]) * dtype.itemsize, page_size)
        self.kv_reservation = process_state.rank_memory().reserve(spec, self._is_one_of_two)
        size_bytes, whole = rows * spec.row_bytes, self.kv_reservation.tensor
        return [
            whole[start : start + size_bytes].view(dtype).view(shape)
            for start in self.kv_reservation.page_pool.geometry.starts
        ]

    def _log_reservation(self, tokens: int, how: str = "") -> None:
        reservation = self.kv_reservation
        assert reservation is not None
        geometry = reservation.page_pool.geometry
        _log.info(
            "KV Cache is reserved (kvcached): #tokens: %d, %s of addresses, %s held; %s%s",
            tokens,
            format_size(geometry.granule_count * geometry.granule_bytes),
            format_size(reservation.rank_memory.held_bytes),
            geometry.describe(),
            how,
        )


class ElasticMHATokenToKVPool(ReservedBuffers, MHATokenToKVPool):
    """Keys and values of every layer. The layout decides the number of buffers."""

    _rows: list[torch.Tensor] | None = None  # buffers that hold keys and values together

    def _create_buffers(self) -> None:
        if not process_state.slots_are_owned():
            if self.is_quantized_kv_cache:
                raise UnsupportedError(
                    "kvcached: a quantized KV cache is not supported: use --kv-cache-dtype auto, "
                    "bfloat16 or fp8"
                )
            if self.post_capture_active or self.kv_cache_layout != "nhd":
                raise UnsupportedError(
                    f"kvcached: the KV layout {self.kv_cache_layout!r} is not supported: unset "
                    "SGLANG_USE_HND_KVCACHE, SGLANG_AITER_KV_CACHE_LAYOUT and "
                    "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"
                )
        super()._create_buffers()

    def _create_buffers_normal(self) -> None:
        if process_state.slots_are_owned():
            super()._create_buffers_normal()  # a draft model's pool shares the slots of its target
            return
        k_shape, v_shape = self._kv_buffer_shapes()
        if k_shape != v_shape:
            raise UnsupportedError(
                f"kvcached: keys of shape {k_shape[1:]} and values of shape {v_shape[1:]} are not supported"
            )
        layout = process_state.rank_memory().layout
        if layout == "engine":
            buffers = self._reserve(k_shape, 2 * self.layer_num, self.page_size)
            self.k_buffer, self.v_buffer = buffers[0::2], buffers[1::2]
            return
        # A model's two pools share a physical page size. Rows of many layers would waste parts of a page.
        is_whole = layout == "block" and not self._is_one_of_two
        count, layers = (1, self.layer_num) if is_whole else (self.layer_num, 1)
        self._rows = self._reserve((k_shape[0], layers, 2, *k_shape[1:]), count, self.page_size)
        self.k_buffer, self.v_buffer = layouts.buffers(self._rows)

    def _slot_move_pointer_buffers(self) -> list[torch.Tensor]:
        """Return the buffers in which SGLang moves slots: whole rows, as its kernel copies a stride."""
        return list(super()._slot_move_pointer_buffers()) if self._rows is None else self._rows

    def _finalize_allocation_log(self, num_tokens: int) -> None:
        if self.kv_reservation is None:
            super()._finalize_allocation_log(num_tokens)
        else:
            whole = self._rows is not None and len(self._rows) < self.layer_num
            how = "all layers of a token" if whole else "keys and values of a layer"
            self._log_reservation(num_tokens, "" if self._rows is None else f"; {how} together")


class ElasticMLATokenToKVPool(ReservedBuffers, MLATokenToKVPool):
    """The latents of each layer in a buffer."""

    def _create_buffers(self) -> None:
        if process_state.slots_are_owned():
            super()._create_buffers()
            return
        if self.use_dsa:
            raise UnsupportedError("kvcached: DeepSeek sparse attention is not supported")
        shape = (self.size + self.page_size, 1, self.kv_cache_dim)
        self.kv_buffer = self._reserve(shape, self.layer_num, self.page_size)

    def _finalize_allocation_log(self, num_tokens: int) -> None:
        if self.kv_reservation is None:
            super()._finalize_allocation_log(num_tokens)
        else:
            self._log_reservation(num_tokens)


def reservation_of(kvcache: Any) -> Reservation:
    """Return the reservation of an elastic pool, or of the full-attention part of a hybrid one.

    Raises UnsupportedError for any other pool, which would keep its full size.
    """
    pool = kvcache if hasattr(kvcache, "kv_reservation") else getattr(kvcache, "full_kv_pool", None)
    reservation = getattr(pool, "kv_reservation", None)
    if not isinstance(reservation, Reservation):
        raise UnsupportedError(f"kvcached: the pool {type(kvcache).__name__} is not supported")
    return reservation
