"""Stand-in for SGLang's CUDA kernels: every name is there, and raises when called."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch


def _absent(name: str) -> Any:
    """Return a function for a kernel that this machine does not have."""

    def kernel(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{name} is a CUDA kernel, and this is the rig for tests without a GPU")

    kernel.__name__ = name.rpartition(".")[2]
    return kernel


class _Kernels(types.ModuleType):
    """A module in which every public name is a kernel."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(f"{self.__name__}.{name}")


class _Words:
    """Scalar types: each is its own name."""

    def __getattr__(self, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes any module below this package that is asked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Kernels(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == f"{__name__}.scalar_type":
            module.scalar_types = _Words()  # type: ignore[attr-defined]
            module.ScalarType = type("ScalarType", (), {})  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _absent(f"{__name__}.{name}")


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int | None = None,
) -> None:
    """Write the slots `out_cache_loc`, in the order of the requests, into rows of `req_to_token`.

    Row `req_pool_indices[i]` gets columns `start_offset[i]` up to `end_offset[i]`.
    """
    taken = 0
    rows = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in rows:
        slots = out_cache_loc[taken : taken + end - start]
        req_to_token[row, start:end] = slots.to(req_to_token.dtype)
        taken += end - start


sys.meta_path.append(_Finder())
