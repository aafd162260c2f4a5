"""The seams: each name that SGLang must have is looked up, and a missing one is reported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from kvcached_core.errors import UnsupportedError
from sglang_kvcached import allocators, pools, prefill, seams, swa
from sglang_kvcached.seams import COMMAND_LINE, SEAMS, VERSIONS, Seam, missing, require

SIZES = "sglang.srt.mem_cache.kv_cache_configurator"


def test_the_installed_sglang_has_every_seam() -> None:
    assert [problem for seam in SEAMS if (problem := missing(seam))] == []
    assert len({(seam.module, seam.qualname) for seam in SEAMS}) == len(SEAMS), "each seam is listed once"
    require()


@pytest.mark.parametrize(
    ("seam", "sentence"),
    [
        (Seam("sglang.nowhere", "Thing"), "sglang.nowhere cannot be imported"),
        (Seam(SIZES, "KVCacheConfigurator.guess"), f"{SIZES} has no KVCacheConfigurator.guess"),
        (Seam(SIZES, "Pool", kind="class"), f"{SIZES} has no Pool"),
        (Seam(SIZES, "KVCacheConfigurator._profile_available_bytes", ("why",)), "does not take why"),
        (Seam(SIZES, "TokenToKVPoolAllocator", ("size", "colour"), "class"), "does not take colour"),
    ],
)
def test_a_missing_seam_is_reported(seam: Seam, sentence: str) -> None:
    assert sentence in missing(seam)


@pytest.mark.parametrize("version", ["0.5.22", "0.4.9.post1", "0.5.9+cu128"])
def test_an_old_engine_is_refused_with_the_remedy(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "upgrade SGLang, or start without" in VERSIONS.problem(version)
    monkeypatch.setattr(seams, "sglang_version", lambda: version)
    with pytest.raises(UnsupportedError, match=f"0.5.23 or newer, and {version.replace('+', '.')}"):
        require()


@pytest.mark.parametrize(
    ("version", "warned"), [("0.5.23", 0), ("0.5.23.post1", 0), ("0.5.24", 1), ("1.0.0", 1)]
)
def test_only_a_newer_engine_is_warned_about(
    version: str, warned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seams, "sglang_version", lambda: version)
    said: list[str] = []
    monkeypatch.setattr(seams._log, "warning", lambda text, *values: said.append(text % values))
    require(COMMAND_LINE)
    seams.warn_if_newer()
    assert len(said) == warned


def test_an_engine_that_differs_is_refused_with_every_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = (Seam(SIZES, "gone"), Seam(SIZES, "KVCacheConfigurator.configure", ("mood",)))
    monkeypatch.setattr(seams, "SEAMS", (*COMMAND_LINE, *gone))
    with pytest.raises(UnsupportedError) as error:
        require()
    assert f"{SIZES} has no gone; {SIZES}.KVCacheConfigurator.configure does not take mood. Use" in str(
        error.value
    )


def test_no_engine_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(seams, "version", none)
    with pytest.raises(UnsupportedError, match="needs SGLang, which is not installed"):
        require()


def test_every_stock_method_that_is_overridden_is_a_seam() -> None:
    known = {(seam.module, seam.qualname) for seam in SEAMS}
    unknown = set()
    for module in (allocators, pools, prefill, swa):
        for ours in vars(module).values():
            if isinstance(ours, type) and ours.__module__ == module.__name__:
                unknown |= overridden(ours) - known
    assert not unknown


def overridden(ours: type) -> set[tuple[str, str]]:
    """Return module and name of each method of SGLang that a class of this plugin overrides."""
    stock = [base for base in ours.__mro__ if base.__module__.startswith("sglang.")]
    names = {
        name for base in ours.__mro__ if base.__module__.startswith("sglang_kvcached.") for name in vars(base)
        if not name.startswith("__") or name == "__init__"
    }  # fmt: skip
    found = set()
    for name in names - {"_abc_impl"}:
        definer = next((base for base in stock if name in vars(base)), None)
        if definer is not None:
            found.add((definer.__module__, f"{definer.__qualname__}.{name}"))
    return found
