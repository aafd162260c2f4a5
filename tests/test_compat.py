"""The static check of seams (engine functions and classes that the plugins rely on), on made-up sources."""

from __future__ import annotations

import shutil
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from tools import compat
from tools.seam_checks import Source, check_seam, seams


class Seam(NamedTuple):
    """A seam as the plugin declares it."""

    module: str
    qualname: str
    parameters: tuple[str, ...] = ()
    kind: str = "function"


FILES = {
    "eng/__init__.py": (
        "from .core import Base\nfrom eng.core import Engine as Renamed\nfrom outside import Other\n"
    ),
    "eng/core.py": (
        "from dataclasses import dataclass\n"
        "class Base:\n"
        "    def __init__(self, size, *, name=''):\n"
        "        self.queue: list = []\n"
        "        self.first, self.second = 1, 2\n"
        "    def step(self, tokens, /, flag=False): ...\n"
        "    async def wait(self, **options): ...\n"
        "    @property\n"
        "    def usage(self): ...\n"
        "class Engine(Base):\n"
        "    level: int = 0\n"
        "try:\n"
        "    import fast\n"
        "except ImportError:\n"
        "    def helper(block): ...\n"
        "@dataclass\n"
        "class Output:\n"
        "    ids: list\n"
        "@dataclass\n"
        "class Longer(Output):\n"
        "    more: int = 0\n"
        "LIMIT = 3\n"
    ),
}
PRESENT = [
    Seam("eng.core", "Base.step", ("self", "tokens", "flag")),
    Seam("eng.core", "Engine.step", ("tokens",)),
    Seam("eng.core", "Base.wait", ("anything",)),
    Seam("eng.core", "Base", ("size", "name"), "class"),
    Seam("eng.core", "Engine", ("size",), "class"),
    Seam("eng.core", "Longer", ("ids", "more"), "class"),
    Seam("eng.core", "helper", ("block",)),
    Seam("eng", "Base.step", ("flag",)),
    Seam("eng", "Renamed.step", ("flag",)),
    Seam("eng.core", "Base.queue", (), "attribute"),
    Seam("eng.core", "Engine.second", (), "attribute"),
    Seam("eng.core", "Engine.level", (), "attribute"),
    Seam("eng.core", "Engine.usage", (), "attribute"),
    Seam("eng.core", "LIMIT", (), "attribute"),
    Seam("eng", "Other", (), "attribute"),
]
ABSENT = [
    (Seam("eng.gone", "Base.step"), "no module eng.gone"),
    (Seam("eng.core", "Gone.step"), "no Gone.step"),
    (Seam("eng.core", "Base.leap"), "no Base.leap"),
    (Seam("eng.core", "Base.heap", (), "attribute"), "no Base.heap"),
    (
        Seam("eng.core", "Base.step", ("tokens", "throttle")),
        "does not accept throttle; it takes self, tokens, flag",
    ),
    (Seam("eng.core", "Base", ("length",), "class"), "does not accept length"),
    (Seam("eng.core", "Longer", ("fewer",), "class"), "does not accept fewer; it takes ids, more"),
    (Seam("eng.core", "Base.usage.depth"), "no Base.usage.depth"),
    (Seam("eng.core", "LIMIT"), "LIMIT is no function"),
    (Seam("eng.core", "helper", (), "class"), "helper is no class"),
]


@pytest.fixture(params=["wheel", "folder"])
def source_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "wheel":
        path = tmp_path / "vllm-9.9.9-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in FILES.items():
                archive.writestr(name, text)
        return path
    for name, text in FILES.items():
        target = tmp_path / "vllm-9.9.9" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return tmp_path / "vllm-9.9.9"


@pytest.mark.parametrize("seam", PRESENT, ids=lambda s: f"{s.module}:{s.qualname}")
def test_a_seam_that_is_there_is_found(source_path: Path, seam: Seam) -> None:
    with Source(source_path) as source:
        assert check_seam(source, seam) == ""


@pytest.mark.parametrize(("seam", "sentence"), ABSENT, ids=lambda v: getattr(v, "qualname", ""))
def test_a_missing_name_or_changed_signature_is_reported(
    source_path: Path, seam: Seam, sentence: str
) -> None:
    with Source(source_path) as source:
        assert sentence in check_seam(source, seam)


def test_the_command_prints_a_table_and_fails_on_a_miss(
    source_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compat, "seams", lambda engine: PRESENT)
    assert compat.main([str(source_path)]) == 0
    monkeypatch.setattr(compat, "seams", lambda engine: [*PRESENT, ABSENT[2][0]])
    assert compat.main([str(source_path)]) == 1
    printed = capsys.readouterr().out
    assert "9.9.9" in printed
    assert "MISSING" in printed
    assert f"{len(PRESENT) + 1} seams checked, 1 missing" in printed


def test_no_seams_at_all_is_a_failure(source_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "seams", lambda engine: [])
    assert compat.main([str(source_path)]) == 1


def test_each_engine_has_a_table_of_its_own(
    source_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / source_path.name.replace("vllm-9.9.9", "sglang-8.8.8")
    if source_path.is_dir():
        shutil.copytree(source_path, other)
    else:
        shutil.copy(source_path, other)
    asked: list[str] = []

    def declared(engine: str) -> list[Seam]:
        asked.append(engine)
        return PRESENT[:2]

    monkeypatch.setattr(compat, "seams", declared)
    assert compat.main([str(source_path), str(other), str(source_path)]) == 0
    assert asked == ["vllm", "sglang"]
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if " " not in line] == ["vllm", "sglang"]
    assert printed[-1] == "4 seams checked, 0 missing"


def test_a_path_of_no_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a name that begins with vllm or sglang"):
        compat.engine_of(Path("torch-2.0-py3-none-any.whl"))


@pytest.mark.parametrize("engine", [engine for engine in compat.ENGINES if find_spec(engine)])
def test_the_installed_engine_has_every_declared_seam(engine: str) -> None:
    found = find_spec(engine)
    assert found is not None and found.submodule_search_locations
    declared = seams(engine)
    assert declared
    with Source(Path(found.submodule_search_locations[0]).parent) as source:
        problems = {f"{s.module}:{s.qualname}": check_seam(source, s) for s in declared}
    assert not {name: problem for name, problem in problems.items() if problem}
