"""The documentation is true: its commands, options, links, file names and quoted messages exist."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from kvcached_core.config import OPTIONS, SWITCH_VARIABLE
from kvcached_core.foreign_settings import other_package_variables
from tools.wheels import ROOT

PAGES = [
    *(p for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if p.exists()),
    *sorted((ROOT / "docs").glob("*.md")),
    *(p for p in (ROOT / "benchmarks" / "README.md",) if p.exists()),
]
BLOCK = re.compile(r"(?P<mark><!-- run -->\s*\n)?^```console\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
VARIABLE = re.compile(r"\bKVCACHED_[A-Z]+(?:_[A-Z]+)*\b")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
# Paths of the development machines. They are written in pieces, so that this file does not contain them.
FOREIGN = re.compile("(?<![A-Za-z0-9_.~-])/(?:wo" + "rk|tmp/" + "w|opt/" + "pypi)(?![A-Za-z0-9_-])")
CODE = re.compile(r"`([^`]+)`")
# A value in a quoted message: dots, one capital letter, a number, or a name with an underscore.
PLACEHOLDER = re.compile(r"\.\.\.|\b(?:[A-Z]|DEVICE|\d+|\w+_\w+)\b")
FILE = re.compile(r"(?:[\w.-]+/)*[\w-]+\.(?:py|json|sh|yaml|yml|md|png|svg)")
MODULE = re.compile(r"\b(?:benchmarks|tools|examples)(?:\.[a-z]\w*)+")


class Command(NamedTuple):
    """A command in a console block; `run` is true if the block is marked with `<!-- run -->`."""

    page: str
    words: tuple[str, ...]
    run: bool


def commands() -> Iterator[Command]:
    """Yield every command of every console block: the lines that begin with `$`."""
    for page in PAGES:
        for block in BLOCK.finditer(page.read_text()):
            for line in block["text"].splitlines():
                if line.startswith("$ "):
                    words = tuple(shlex.split(line.removeprefix("$ "), comments=True))
                    yield Command(page.name, words, block["mark"] is not None)


def tracked() -> list[Path]:
    """Return the files that git tracks, and the new files that it does not ignore."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def run_kvctl(*words: str, runtime: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from kvctl.main import main; sys.exit(main())"
    path = os.pathsep.join(str(ROOT / part) for part in ("", "cli"))
    environ = os.environ | {"KVCACHED_RUNTIME_DIR": str(runtime), "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code, *words], env=environ, capture_output=True, text=True, timeout=60
    )


def test_there_is_documentation() -> None:
    names = {page.name for page in PAGES}
    assert names >= {"README.md", "CONTRIBUTING.md"}
    assert names >= {"design.md", "vllm.md", "sglang.md", "troubleshooting.md"}


def test_console_commands_exist(tmp_path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong: list[str] = []
    helped: set[str] = set()
    for command in commands():
        words = [word for word in command.words if not re.match(r"[A-Z_]+=", word)]
        if words[:1] == ["make"]:
            wrong += [f"{command.page}: make {word}" for word in words[1:] if word not in targets]
        elif words[:1] == ["kvctl"] and len(words) > 1 and not words[1].startswith("-"):
            helped.add(words[1])
    wrong += [name for name in sorted(helped) if run_kvctl(name, "--help", runtime=tmp_path).returncode]
    assert wrong == []


def test_console_commands_marked_to_be_run_succeed(tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    for command in commands():
        if command.run:
            assert command.words[0] == "kvctl", f"{command}: only kvctl is run"
            done = run_kvctl(*command.words[1:], runtime=runtime)
            assert done.returncode == 0, f"{command}: {done.stderr}"


def test_every_variable_is_an_option_and_stands_once_in_the_table() -> None:
    options = {option.variable for option in OPTIONS}
    sources = [p for folder in ("kvcached_core", "cli", "plugins") for p in (ROOT / folder).rglob("*.py")]
    in_source = {name for path in sources for name in VARIABLE.findall(path.read_text())}
    assert in_source <= options, f"in the source and no option: {sorted(in_source - options)}"
    page = (ROOT / "docs" / "vllm.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("|")]
    in_table = Counter(name for row in rows for name in set(VARIABLE.findall("|".join(row[:3]))))
    assert in_table == Counter(options)
    assert SWITCH_VARIABLE in page


def test_links_between_pages_have_a_target() -> None:
    broken = []
    for page in PAGES:
        for target in LINK.findall(page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []


def messages() -> Iterator[str]:
    """Yield every string in the sources, with a null character for each formatted value."""
    for folder in ("kvcached_core", "cli", "plugins"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                    yield "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield re.sub(r"%[\d.]*[a-z]", "\0", node.value)


def test_messages_that_troubleshooting_quotes_are_in_the_sources() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    seen = [line.split("|")[1] for line in page.splitlines() if line.startswith("|")]
    quoted = [text for cell in seen for text in CODE.findall(cell) if " " in text]
    quoted = [text for text in quoted if not text.startswith("kvctl ")]
    assert len(quoted) >= 17
    sources = list(messages())
    wrong = []
    for text in quoted:
        pattern = re.compile(".*".join(map(re.escape, PLACEHOLDER.split(text))), re.DOTALL)
        if not any(map(pattern.search, sources)):
            wrong.append(text)
    assert not wrong, f"docs/troubleshooting.md quotes messages that no source has: {wrong}"


def test_files_and_modules_that_pages_name_exist() -> None:
    paths = {str(path.relative_to(ROOT)) for path in tracked()}
    names = {path.rpartition("/")[2] for path in paths}
    wrong = []
    for page in PAGES:
        for span in CODE.findall(page.read_text()):
            if FILE.fullmatch(span) and span not in paths and span not in names:
                is_there = "/" in span and any(path.endswith("/" + span) for path in paths)
                wrong += [] if is_there else [f"{page.name}: {span}"]
            for module in MODULE.findall(span):
                if not any(f"{module.replace('.', '/')}{end}" in paths for end in (".py", "/__main__.py")):
                    wrong.append(f"{page.name}: {module}")
    assert wrong == []


def test_nothing_in_the_tree_names_the_machine_it_was_made_on() -> None:
    found = []
    for path in tracked():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(lines, 1) if FOREIGN.search(line)]
    assert found == []


def test_the_search_for_foreign_paths_finds_them() -> None:
    assert FOREIGN.search("see /wo" + "rk/main")
    assert FOREIGN.search("(/tmp/" + "w)")
    assert not FOREIGN.search("a/worker /workers /tmp/weights kvcached/work ~/work")


def test_migrating_names_every_variable_of_the_other_package() -> None:
    page = (ROOT / "docs" / "migrating.md").read_text()
    assert [name for name in other_package_variables() if f"`{name}`" not in page] == []
