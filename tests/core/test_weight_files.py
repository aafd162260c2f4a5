"""The files of a model's weights, and their size once loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from kvcached_core.startup.weight_files import loaded_bytes, weight_files


def safetensors(path: Path, dtype: str, *shapes: list[int], item_bytes: int = 2) -> int:
    """Write the header of a file of these tensors, with a hole for their data; return the size of these."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for number, shape in enumerate(shapes):
        begin, end = end, end + item_bytes * math.prod(shape)
        header[f"w{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


@pytest.mark.parametrize(("dtype", "item_bytes"), [("F32", 4), ("BF16", 2), ("F16", 2), ("F64", 8)])
@pytest.mark.parametrize("float_bytes", [2, 4])
def test_floats_count_as_they_are_loaded(
    tmp_path: Path, dtype: str, item_bytes: int, float_bytes: int
) -> None:
    file = tmp_path / "model.safetensors"
    safetensors(file, dtype, [64, 64], [3], item_bytes=item_bytes)
    assert loaded_bytes(file, float_bytes) == (64 * 64 + 3) * float_bytes


def test_other_numbers_count_as_they_are_stored(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    size = safetensors(file, "I32", [64, 64], item_bytes=4)
    assert loaded_bytes(file, 2) == size
    assert loaded_bytes(file, 0) == file.stat().st_size, "quantized: as large as the file"


def test_only_files_that_an_engine_would_load_count(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors", "consolidated.safetensors", "pytorch_model.bin"):
        safetensors(tmp_path / name, "BF16", [10])
    (tmp_path / "optimizer.pt").write_bytes(b"x" * 1000)
    assert [file.name for file in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "b.safetensors"}}')
    assert [file.name for file in weight_files(tmp_path)] == ["b.safetensors"]
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "not-here.safetensors"}}')
    assert weight_files(tmp_path) == [], "a part of the weights is no measure of all"


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "consolidated.pt", "model-q4.gguf", "consolidated.safetensors"]
)
def test_other_formats_are_found_where_there_are_no_safetensors(tmp_path: Path, name: str) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"x" * 99)
    safetensors(tmp_path / name, "BF16", [500])
    assert weight_files(tmp_path) == weight_files(tmp_path / name) == [tmp_path / name]
    size = 1000 if name.endswith("safetensors") else (tmp_path / name).stat().st_size
    assert loaded_bytes(tmp_path / name, 2) == size


def test_a_model_that_is_not_here_has_no_files(tmp_path: Path) -> None:
    assert weight_files(None) == weight_files(tmp_path) == weight_files(tmp_path / "gone") == []
