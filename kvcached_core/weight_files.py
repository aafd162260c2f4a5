"""The files of a model's weights, and what they take once they are loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path

_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_NOT_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state")
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})  # of safetensors: loaded in the dtype of the model


def weight_files(path: Path | None) -> list[Path]:
    """Return the files of the weights in a model's folder, or the file that is the model; [] if any lacks."""
    if path is None or not path.is_dir():
        return [path] if path is not None and path.is_file() else []
    index = path / "model.safetensors.index.json"
    if index.exists():
        named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [path / name for name in named]
        return files if all(file.exists() for file in files) else []
    for pattern in _PATTERNS:
        found = sorted(file for file in path.glob(pattern) if not file.name.startswith(_NOT_WEIGHTS))
        # Some models bring a second copy of themselves in one file.
        if only := [file for file in found if not file.name.startswith("consolidated")] or found:
            return only
    return []


def loaded_bytes(file: Path, float_bytes: int) -> int:
    """Return the bytes of a file's tensors once loaded, floating point numbers as `float_bytes`, if not 0."""
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
