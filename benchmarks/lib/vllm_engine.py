"""Start vLLM for a benchmark, with a model folder of the shape of Llama-8B."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
BACKENDS = ("stock", "kvcached")


class RandomWeights:
    """Methods that worker_extension_cls adds to vLLM's workers: random weights, free memory, profiles."""

    def bench_randomize(self, seed: int, deviation: float) -> None:
        """Overwrite all weight matrices with random numbers, in place, so that captured graphs stay valid."""
        import torch

        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        generator = torch.Generator(device=next(model.parameters()).device)
        generator.manual_seed(seed)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                if parameter.dim() > 1:
                    parameter.normal_(0.0, deviation, generator=generator)

    def bench_memory(self) -> tuple[int, int]:
        """Return free and total bytes of the device."""
        import torch

        free, total = torch.cuda.mem_get_info()
        return int(free), int(total)

    def bench_profile(self) -> None:
        """Start recording the device's kernels."""
        from torch import profiler

        kind = profiler.ProfilerActivity
        on_gpu = kind.CUDA in profiler.supported_activities()
        self._bench_profiler = profiler.profile(activities=[kind.CUDA if on_gpu else kind.CPU])
        self._bench_profiler.start()

    def bench_profiled(self) -> dict[str, Any]:
        """Return a summary of the kernels since bench_profile; see benchmarks.lib.profiles."""
        from benchmarks.lib import profiles

        self._bench_profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            self._bench_profiler.export_chrome_trace(f"{folder}/{profiles.NAME}")
            return profiles.summary(profiles.read(Path(folder)))


def model_folder(path: Path, **changes: Any) -> Path:
    """Write a model folder that has only a configuration, for load_format=dummy."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(SHAPE | changes))
    return path


def engine(backend: str, model: Path, kv_bytes: int | None, options: dict[str, Any], **more: Any) -> Any:
    """Start vLLM with the stock or the elastic backend; `kv_bytes` bounds the KV cache of either."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # no multicast
    from vllm import LLM

    import vllm_kvcached

    arguments: dict[str, Any] = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 4096,
        "gpu_memory_utilization": 0.9,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": kv_bytes,
        "worker_extension_cls": "benchmarks.lib.vllm_engine.RandomWeights",
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        "max_num_seqs": 256,
        "disable_log_stats": False,
    }
    if backend == "kvcached":
        arguments |= vllm_kvcached.llm_kwargs(**options)
    return LLM(**(arguments | more))


def free_bytes(llm: Any) -> list[int]:
    """Return the free memory of each rank's device, as its worker sees it."""
    return [int(free) for free, _ in llm.collective_rpc("bench_memory")]


def prompts(count: int, length: int, seed: int, vocabulary: int = 100_000) -> list[dict[str, Any]]:
    """Return prompts of random token ids, which depend on `seed`."""
    import random

    source = random.Random(seed)
    return [
        {"prompt_token_ids": [source.randrange(100, vocabulary) for _ in range(length)]} for _ in range(count)
    ]
