"""The seams: each name that vLLM must have is looked up, and a missing name is reported."""

from __future__ import annotations

import builtins
from typing import Any

import pytest

from kvcached_core.errors import UnsupportedError
from vllm_kvcached import seams
from vllm_kvcached.seams import SEAMS, VERSIONS, Seam, missing, require

QUEUE = "vllm.v1.core.kv_cache_utils"


def test_the_installed_vllm_has_every_seam() -> None:
    assert [problem for seam in SEAMS if (problem := missing(seam))] == []
    assert len({(seam.module, seam.qualname) for seam in SEAMS}) == len(SEAMS), "each is named once"


@pytest.mark.parametrize(
    ("seam", "sentence"),
    [
        (Seam("vllm.nowhere", "Thing"), "vllm.nowhere cannot be imported"),
        (Seam(QUEUE, "FreeKVCacheBlockQueue.shuffle"), f"{QUEUE} has no FreeKVCacheBlockQueue.shuffle"),
        (Seam(QUEUE, "BlockHeap", kind="class"), f"{QUEUE} has no BlockHeap"),
        (Seam(QUEUE, "FreeKVCacheBlockQueue.remove", ("self", "block", "why")), "does not take why"),
    ],
)
def test_a_missing_seam_is_named(seam: Seam, sentence: str) -> None:
    assert sentence in missing(seam)


@pytest.mark.parametrize("version", ["0.29.9", "0.8.5.post1", "0.20.0+cu128"])
def test_an_old_engine_is_refused_with_the_remedy(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "upgrade vLLM, or start without" in VERSIONS.problem(version)
    monkeypatch.setattr(seams, "vllm_version", lambda: version)
    with pytest.raises(UnsupportedError, match=f"needs vLLM 0.30 or newer, and {version.replace('+', '.')}"):
        require()


@pytest.mark.parametrize("version", ["0.30.0", "0.31.2rc1", "0.32.0+cpu", "0.33.4", "0.33.0.dev7+g1"])
def test_a_tested_engine_is_accepted_without_a_warning(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(seams, "vllm_version", lambda: version)
    monkeypatch.setattr(seams, "missing", lambda seam: pytest.fail("nothing needs to be looked for"))
    require()
    assert caplog.records == []


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("version", ["0.34.0", "1.0.0"])
def test_a_newer_engine_with_all_seams_is_warned_about(
    version: str, cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seams, "vllm_version", lambda: version)
    said: list[str] = []
    monkeypatch.setattr(seams._log, "warning", lambda text, *values: said.append(text % values))
    require(cpu)
    assert [text.partition(",")[0] for text in said] == [f"vLLM {version} is newer than 0.33"]


def test_a_newer_engine_without_a_seam_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "vllm_version", lambda: "0.34.0")
    gone = (
        Seam(QUEUE, "FreeKVCacheBlockQueue.gone"),
        Seam("vllm.v1.core.block_pool", "BlockPool.touch", ("who",)),
    )
    monkeypatch.setattr(seams, "SEAMS", (*SEAMS, *gone))
    with pytest.raises(UnsupportedError) as error:
        require()
    assert "FreeKVCacheBlockQueue.gone; " in str(error.value)
    assert "BlockPool.touch does not take who. Upgrade vllm-kvcached" in str(error.value)


def test_the_seams_of_another_platform_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "vllm_version", lambda: "0.34.0")
    asked: list[str] = []

    def look(seam: Seam) -> str:
        asked.append(seam.module)
        return ""

    monkeypatch.setattr(seams, "missing", look)
    require(cpu=True)
    on_cpu = set(asked)
    asked.clear()
    require(cpu=False)
    assert "vllm.v1.worker.cpu_worker" in on_cpu - set(asked)
    assert "vllm.v1.worker.gpu_worker" in set(asked) - on_cpu


def test_no_engine_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_vllm(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "vllm":
            raise ImportError("no vllm here")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_vllm)
    with pytest.raises(UnsupportedError, match="needs vLLM, which cannot be imported: no vllm here"):
        require()
