"""Refused options with their messages, options that only cause a warning, and names in the ledger."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from kvcached_core.errors import ConfigError, UnsupportedError
from sglang_kvcached import support
from sglang_kvcached.process_state import RUN_VARIABLE


def options(**changes: Any) -> dict[str, Any]:
    """Return SGLang's own arguments with some changed."""
    given = support.unresolved_options(ServerArgs(model_path="m"))
    assert not set(changes) - set(given), "SGLang has these arguments"
    return given | changes


def test_sglangs_defaults_are_supported() -> None:
    support.refuse(options())
    support.refuse(options(page_size=16, tp_size=2, kv_cache_dtype="fp8_e5m2", speculative_algorithm="EAGLE"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"enable_memory_saver": True}, "leave out --enable-memory-saver"),
        ({"enable_unified_memory": True}, "leave out --enable-unified-memory"),
        ({"enable_hisparse": True}, "leave out --enable-hisparse"),
        ({"enable_kv_cache_sharding": True}, "leave out --enable-kv-cache-sharding"),
        ({"enable_page_major_kv_layout": True}, "leave out --enable-page-major-kv-layout"),
        ({"enable_hierarchical_cache": True}, "leave out --enable-hierarchical-cache"),
        ({"enable_lmcache": True}, "leave out --enable-lmcache"),
        ({"enable_flexkv": True}, "leave out --enable-flexkv"),
        ({"enable_unified_cache_external_linker": True}, "--enable-unified-cache-external-linker"),
        ({"enable_pdmux": True}, "leave out --enable-pdmux"),
        ({"enable_two_batch_overlap": True}, "leave out --enable-two-batch-overlap"),
        ({"prefill_only_disable_kv_cache": True}, "leave out --prefill-only-disable-kv-cache"),
        ({"use_ray": True}, "leave out --use-ray"),
        ({"disaggregation_mode": "prefill"}, "leave out --disaggregation-mode prefill"),
        ({"kv_cache_dtype": "fp4_e2m1"}, "use --kv-cache-dtype auto"),
        ({"kv_cache_dtype": "mxfp8"}, "use --kv-cache-dtype auto"),
        ({"pp_size": 2}, "leave out --pp-size"),
        ({"dcp_size": 2}, "leave out --dcp-size"),
        ({"nnodes": 2}, "leave out --nnodes"),
        ({"elastic_ep_backend": "mooncake"}, "leave out --elastic-ep-backend"),
    ],
)
def test_options_that_cannot_be_combined_are_refused_with_the_remedy(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UnsupportedError, match=r"^--kv-cache-backend kvcached: ") as error:
        support.refuse(options(**changes))
    assert sentence in str(error.value)


def test_all_reasons_are_in_one_message() -> None:
    with pytest.raises(UnsupportedError, match=r"memory saver.*; .*--pp-size"):
        support.refuse(options(enable_memory_saver=True, pp_size=2))


@pytest.mark.parametrize("name", ["SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "SGLANG_USE_HND_KVCACHE"])
def test_variables_that_change_the_cache_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0")
    support.refuse(options())
    monkeypatch.setenv(name, "true")
    with pytest.raises(UnsupportedError, match=f"{name} .*: unset it"):
        support.refuse(options())


def configurator(dtype: str = "auto", **config: Any) -> Any:
    """Return a fake KV cache configurator of a model with this configuration."""
    model = SimpleNamespace(architectures=["LlamaForCausalLM"], **config)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=model), kv_cache_dtype_str=dtype, is_hybrid_swa=False
    )


@pytest.mark.parametrize(
    ("architecture", "extra", "name"),
    [
        ("DeepseekV32ForCausalLM", {"index_topk": 2048}, "DeepSeek sparse attention"),
        ("DeepseekV4ForCausalLM", {}, "DeepSeek-V4"),
    ],
)
def test_a_model_with_another_kind_of_cache_is_refused_by_name(
    architecture: str, extra: dict[str, Any], name: str
) -> None:
    asked = configurator(**extra)
    asked.model_config.hf_config.architectures = [architecture]
    with pytest.raises(UnsupportedError, match=rf"{name} is not supported yet \({architecture}\)"):
        support.refuse_model(asked)


@pytest.mark.parametrize("backends", [("torch_native", "torch_native"), ("triton", "torch_native")])
def test_torch_native_attention_is_refused_for_a_sliding_windows_own_pool(
    backends: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = configurator()
    asked.is_hybrid_swa = True
    monkeypatch.setattr("sglang.srt.runtime_context.attention_backends", lambda: ("triton", "triton"))
    support.refuse_model(asked)
    monkeypatch.setattr("sglang.srt.runtime_context.attention_backends", lambda: backends)
    with pytest.raises(UnsupportedError, match="--disable-hybrid-swa-memory"):
        support.refuse_model(asked)


def test_an_ordinary_model_is_accepted_and_its_quantized_cache_is_not() -> None:
    support.refuse_model(configurator())
    with pytest.raises(UnsupportedError, match="the quantized KV cache fp4_e2m1 is not"):
        support.refuse_model(configurator("fp4_e2m1"))


def test_a_platform_with_its_own_pool_is_refused() -> None:
    support.refuse_platform(None, "KV pool")
    with pytest.raises(UnsupportedError, match=r"has a KV pool of its own \(builtins.dict\)"):
        support.refuse_platform(dict, "KV pool")


def test_untested_features_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(support._log, "warning", lambda text, *values: said.append(text % values))
    support.warn_of_untested(options())
    assert said == []
    support.warn_of_untested(options(enable_lora=True, dp_size=2))
    assert [text.partition("with ")[2].partition(";")[0] for text in said] == ["data parallelism", "LoRA"]


def test_an_instance_is_named_after_the_run_and_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_VARIABLE, "run")
    assert support.instance(SimpleNamespace(instance_id="server", nccl_port=1)) == "run-server"
    assert support.instance(SimpleNamespace(instance_id="", nccl_port=1)) == "run-1"


def test_log_lines_follow_the_engines_level() -> None:
    support.adopt_logging()
    assert logging.getLogger("kvcached_core").getEffectiveLevel() == logging.getLogger().level


def test_an_age_limit_of_the_cache_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCACHED_CACHE_SECONDS", "60")
    with pytest.raises(ConfigError, match="unset KVCACHED_CACHE_SECONDS"):
        support.settings()
    monkeypatch.setenv("KVCACHED_CACHE_SECONDS", "0")
    assert support.settings().cache_seconds == 0
