"""Estimates before loading: from weight files, from the hub's cache, and from the parameter count."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from devkit.models import TINY
from kvcached_core.startup import estimates
from kvcached_core.units import GIB
from tests.vllm.engines import vllm_config
from vllm_kvcached import weights


def safetensors(path: Path, dtype: str, *shapes: list[int], item_bytes: int = 2) -> int:
    """Write a safetensors file with these tensors and a hole for their data; return the data's size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for number, shape in enumerate(shapes):
        begin, end = end, end + item_bytes * torch.Size(shape).numel()
        header[f"w{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


@dataclasses.dataclass
class Model:
    """The fields of vLLM's model configuration that the estimate reads."""

    model: str
    dtype: torch.dtype = torch.bfloat16
    quantization: str | None = None
    revision: str | None = None
    hf_text_config: Any = None


def config(model: Model, ranks: tuple[int, int] = (1, 1), load_format: str = "auto") -> Any:
    """Return a configuration of this model over (tensor parallel, pipeline parallel) ranks."""
    return SimpleNamespace(
        model_config=model,
        load_config=SimpleNamespace(load_format=load_format, download_dir=None),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks[0], pipeline_parallel_size=ranks[1]),
    )


def test_the_weights_are_the_files_of_the_model_shared_by_its_ranks(tmp_path: Path) -> None:
    size = safetensors(tmp_path / "model.safetensors", "BF16", [100, 30], [7])
    assert weights.weight_bytes(config(Model(str(tmp_path)))) == size == 2 * 3007
    assert weights.weight_bytes(config(Model(str(tmp_path)), (2, 2))) == -(-size // 4)


@pytest.mark.parametrize(
    ("dtype", "item_bytes", "loaded"),
    [("F32", 4, torch.bfloat16), ("BF16", 2, torch.float32), ("F16", 2, torch.float16)],
)
def test_floats_count_as_the_dtype_they_are_loaded_in(
    tmp_path: Path, dtype: str, item_bytes: int, loaded: torch.dtype
) -> None:
    safetensors(tmp_path / "model.safetensors", dtype, [64, 64], item_bytes=item_bytes)
    assert weights.weight_bytes(config(Model(str(tmp_path), loaded))) == 64 * 64 * loaded.itemsize


def test_quantized_weights_count_as_stored(tmp_path: Path) -> None:
    size = safetensors(tmp_path / "model.safetensors", "I32", [64, 64], item_bytes=4)
    assert weights.weight_bytes(config(Model(str(tmp_path), torch.bfloat16))) == size
    file_bytes = (tmp_path / "model.safetensors").stat().st_size
    assert weights.weight_bytes(config(Model(str(tmp_path), quantization="awq"))) == file_bytes


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "consolidated.pt", "model-q4.gguf", "consolidated.safetensors"]
)
def test_other_formats_count_as_large_as_their_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"x" * 99)
    safetensors(tmp_path / name, "BF16", [500])
    expected = 1000 if name.endswith("safetensors") else (tmp_path / name).stat().st_size
    assert weights.weight_bytes(config(Model(str(tmp_path)))) == expected


def test_a_model_in_the_hubs_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    size = safetensors(snapshot / "model.safetensors", "BF16", [1000])
    assert weights.weight_bytes(config(Model("org/name"))) == size


def test_without_files_the_parameters_are_counted(tmp_path: Path) -> None:
    """Counts embedding, head, a final norm, and per layer four projections, three MLP matrices, two norms."""
    hidden, inner, layers = TINY["hidden_size"], TINY["intermediate_size"], TINY["num_hidden_layers"]
    heads, kv = TINY["num_attention_heads"], TINY["num_key_value_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * hidden * kv // heads
    per_layer = attention + 3 * hidden * inner + 2 * hidden
    tied = TINY.get("tie_word_embeddings", False)
    count = TINY["vocab_size"] * hidden * (1 if tied else 2) + layers * per_layer + hidden
    made = vllm_config(tmp_path)
    random, default = torch.get_rng_state(), torch.get_default_dtype()
    assert weights.weight_bytes(made) == 4 * count
    assert torch.equal(random, torch.get_rng_state()) and torch.get_default_dtype() is default
    (tmp_path / "model.safetensors").write_bytes(b"not looked at")
    made.load_config.load_format = "dummy"
    assert weights.weight_bytes(made) == 4 * count


def test_a_failed_estimate_counts_as_0_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little"))
    caplog.set_level(logging.INFO, "vllm_kvcached.weights")
    assert weights.private_bytes(config(Model(str(tmp_path))), on_host=False) == estimates.DEVICE_BYTES
    assert weights.private_bytes(config(Model("org/nowhere")), on_host=True) == estimates.HOST_BYTES
    assert caplog.text.count("cannot estimate the size of the weights") == 2


def test_more_than_the_weights_is_claimed(tmp_path: Path) -> None:
    size = safetensors(tmp_path / "model.safetensors", "BF16", [1000])
    assert weights.private_bytes(config(Model(str(tmp_path))), on_host=False) == size + 2 * GIB
    assert weights.private_bytes(config(Model(str(tmp_path))), on_host=True) == size + GIB


def test_the_longest_requests_estimate_is_an_upper_bound_of_its_blocks(tmp_path: Path) -> None:
    made = vllm_config(tmp_path)
    layers, kv = TINY["num_hidden_layers"], TINY["num_key_value_heads"]
    head = TINY["hidden_size"] // TINY["num_attention_heads"]
    exact = 512 * layers * kv * head * 2 * 4
    assert exact < weights.longest_request_bytes(made) <= 1.11 * exact
    made.cache_config.cache_dtype = "bfloat16"
    assert weights.longest_request_bytes(made) <= 0.56 * exact


def test_a_length_that_vllm_has_not_chosen_yet_needs_no_floor(tmp_path: Path) -> None:
    made = vllm_config(tmp_path)
    made.model_config.original_max_model_len = -1
    assert weights.longest_request_bytes(made) == 0
