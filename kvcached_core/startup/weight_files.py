"""The size of a model's weights once they are loaded: from its files, or from its description."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_NOT_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state")
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})  # of safetensors: loaded in the dtype of the model


def weight_files(path: Path | None) -> list[Path]:
    """Return the weight files of a model, which is a folder or one file; [] if one is missing."""
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
    """Return the bytes of a file's tensors once loaded, with `float_bytes` a float (0: as stored)."""
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
    """Return a model's path on this machine: `name`, or its folder in the hub's cache; else None."""
    path = Path(name)
    if path.exists():
        return path
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def weight_bytes(model: Any, folder: Path | None) -> int:
    """Return the bytes of all weights of an engine's ModelConfig: from the files in `folder` if they are
    there, else from the parameters."""
    float_bytes = 0 if model.quantization else int(model.dtype.itemsize)
    return sum(loaded_bytes(file, float_bytes) for file in weight_files(folder)) or _parameter_bytes(model)


def _parameter_bytes(model: Any) -> int:
    """Return the bytes of all parameters; transformers builds the model without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.hf_text_config)  # it is written to
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        described = AutoModelForCausalLM.from_config(config)
    count: int = sum(weight.numel() for weight in described.parameters())
    return count * int(model.dtype.itemsize)
