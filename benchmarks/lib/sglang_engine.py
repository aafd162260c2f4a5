"""Start SGLang for a benchmark, generate answers, and read the device's free memory."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

BYTES_PER_TOKEN = 131_072  # Llama-8B: 32 layers, 8 KV heads of 128, keys and values, 2 bytes each
_FLUSH_SECONDS = 10.0


def on_gpu() -> bool:
    """Return whether there is a GPU, without making a CUDA context on it."""
    return Path("/dev/nvidiactl").exists()


def engine(backend: str, model: Path, kv_bytes: int | None, settings: dict[str, Any], requests: int,
           token_bytes: int = BYTES_PER_TOKEN, ranks: int = 1, **more: Any) -> Any:  # fmt: skip
    """Start SGLang with the stock or the elastic backend.

    `kv_bytes` bounds the KV cache of each rank in either backend (None: the engine chooses). `token_bytes` is
    the size of a token over all ranks. Without a GPU the engine runs on the CPU, to try these scripts out.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # no multicast
    arguments: dict[str, Any] = {
        "model_path": str(model),
        "skip_tokenizer_init": True,
        "context_length": 4096,
        "max_running_requests": requests,
        "random_seed": 1,
        "tp_size": ranks,
        "log_level": "info",
    }
    if on_gpu():
        # Available on every machine: Triton's attention, PyTorch's sampling.
        arguments |= {"attention_backend": "triton", "sampling_backend": "pytorch"}
        arguments |= {"mem_fraction_static": 0.85}
    else:
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
        arguments |= {"device": "cpu", "attention_backend": "torch_native", "dtype": "float32"}
    context: Any = nullcontext()
    if backend == "kvcached":
        import sglang_kvcached

        context = sglang_kvcached.elastic(**(({"limit": str(kv_bytes)} if kv_bytes else {}) | settings))
    elif kv_bytes:
        arguments["max_total_tokens"] = kv_bytes * ranks // token_bytes
    import sglang

    with context:
        return sglang.Engine(**(arguments | more))


def generate(of: Any, prompts: list[list[int]], tokens: int, **more: Any) -> list[dict[str, Any]]:
    """Send all prompts at once; return the answers, each of `tokens` tokens."""
    sampling = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
    answers: list[dict[str, Any]] = of.generate(input_ids=prompts, sampling_params=sampling, **more)
    return answers


def flush(of: Any) -> None:
    """Drop the prefix cache. Raises TimeoutError if the engine stays busy."""
    end = time.monotonic() + _FLUSH_SECONDS
    while not of.flush_cache().success:  # refused until the engine has finished its last step
        if time.monotonic() > end:
            raise TimeoutError(f"the prefix cache was not flushed within {_FLUSH_SECONDS:g} s")
        time.sleep(0.05)


def free_bytes(ranks: int = 1) -> list[int]:
    """Return the free memory of the first `ranks` GPUs, or of the machine if it has no GPU."""
    if not on_gpu():
        meminfo = Path("/proc/meminfo").read_text()
        return [int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024] * ranks
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    query += [f"--id={','.join(map(str, range(ranks)))}"]
    shown = subprocess.run(query, check=True, capture_output=True, text=True).stdout
    return [int(line) * 2**20 for line in shown.split()]
