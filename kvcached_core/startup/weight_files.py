"""The size of a model's weights once loaded: from its weight files, or from its parameter count."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_NOT_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state")
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})  # types of safetensors, loaded in the model's dtype


def weight_files(path: Path | None) -> list[Path]:
    """Return the weight files of a model (a folder or one file); [] if any file is missing."""
    if path is None or not path.is_dir():
        return [path] if path is not None and path.is_file() else []
    index = path / "model.safetensors.index.json"
    if index.exists():
        named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [path / name for name in named]
        return files if all(file.exists() for file in files) else []
    for pattern in _PATTERNS:
        found = sorted(file for file in path.glob(pattern) if not file.name.startswith(_NOT_WEIGHTS))
        # Some models come with a second copy of their weights in one file.
        if only := [file for file in found if not file.name.startswith("consolidated")] or found:
            return only
    return []


def loaded_bytes(file: Path, float_bytes: int) -> int:
    """Return the bytes of a file's tensors once loaded, at `float_bytes` per float (0: as stored)."""
    if file.suffix != ".safetensors" or not float_bytes:
        return file.stat().st_size
    with file.open("rb") as data:  # https://huggingface.co/docs/safetensors: length, then the header
        header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
    return sum(
        math.prod(tensor["shape"]) * float_bytes
        if tensor["dtype"] in _FLOATS
        else tensor["data_offsets"][1] - tensor["data_offsets"][0]
        for name, tensor in header.items()
        if name != "__metadata__"
    )


def model_folder(name: str, revision: str | None, cache_dir: str | None = None) -> Path | None:
    """Return a model's local path: `name` itself, or its folder in Hugging Face's cache; else None."""
    path = Path(name)
    if path.exists():
        return path
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def weight_bytes(model: Any, folder: Path | None) -> int:
    """Return the bytes of all weights of `model`, an engine's ModelConfig.

    Reads the files in `folder` if there are any, else counts the parameters.
    """
    float_bytes = 0 if model.quantization else int(model.dtype.itemsize)
    return sum(loaded_bytes(file, float_bytes) for file in weight_files(folder)) or _parameter_bytes(model)


def _parameter_bytes(model: Any) -> int:
    """Return the bytes of all parameters, counted on a model built on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.hf_text_config)  # from_config() writes to it
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        described = AutoModelForCausalLM.from_config(config)
    count: int = sum(weight.numel() for weight in described.parameters())
    return count * int(model.dtype.itemsize)
