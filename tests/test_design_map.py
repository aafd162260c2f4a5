"""docs/design.md matches the code: its map has every module, and every name on the page exists."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

from kvcached_core.ledger.file import layout
from tools.wheels import ROOT

DESIGN = (ROOT / "docs" / "design.md").read_text()
FOLDERS = (
    "kvcached_core",
    "cli/kvctl",
    "plugins/vllm_kvcached/vllm_kvcached",
    "plugins/sglang_kvcached/sglang_kvcached",
)
TABLE = re.compile(r"^\| `(?P<folder>[\w/]+/)` \| \|\n\|---\|---\|\n(?P<rows>(?:\|.*\n)+)", re.MULTILINE)
ROW = re.compile(r"^\| `(\w+)` \| (.+) \|$")
CODE = re.compile(r"`([^`]+)`")
METHOD = re.compile(r"\b([A-Z]\w+)\.(\w+)")


def mapped() -> list[str]:
    """Return the path of every module that the map names, in its order."""
    return [
        f"{table['folder']}{row[1]}.py"
        for table in TABLE.finditer(DESIGN)
        for row in map(ROW.fullmatch, table["rows"].splitlines())
        if row
    ]


def is_empty(path: Path) -> bool:
    """Say whether a package's file has nothing but a docstring and constants."""
    if path.name != "__init__.py":
        return False
    return not any(
        isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.parse(path.read_text()).body
    )


def modules() -> list[str]:
    """Return the path of every module of the tree."""
    paths = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return sorted(str(path.relative_to(ROOT)) for path in paths if not is_empty(path))


def names_in(path: Path) -> set[str]:
    """Return the functions, the classes and the methods (`Class.method`) of a file."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
    return found


def test_the_map_names_every_module_once() -> None:
    counts, tree = Counter(mapped()), modules()
    problems = [f"{path}: in the map {n} times, remove a row" for path, n in counts.items() if n > 1]
    problems += [f"{path}: not in the tree, remove or rename its row" for path in counts if path not in tree]
    for path in tree:
        if path not in counts:
            folder, name = path.rsplit("/", 1)
            row = f"| `{name.removesuffix('.py')}` | what it is for |"
            problems.append(f"{path}: add to a table headed | `{folder}/` | | the row {row}")
    assert not problems, "mend the map in docs/design.md:\n" + "\n".join(problems)


def test_where_to_look_names_functions_that_their_file_has() -> None:
    section = DESIGN.partition("## Where to look\n")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ") and ".py" in line]
    assert len(rows) >= 10
    wrong = []
    for _, _, file, functions, _ in rows:
        files = [span for span in CODE.findall(file + functions) if span.endswith(".py")]
        known = set().union(*(names_in(ROOT / path) for path in files))
        names = [span for span in CODE.findall(functions) if not span.endswith(".py")]
        if names[0] not in names_in(ROOT / files[0]):
            wrong.append(f"{names[0]} is not in {files[0]}")
        wrong += [f"{name} is not in {files}" for name in names if "." not in name and name not in known]
    assert not wrong, f'mend "Where to look" in docs/design.md: {wrong}'


def test_methods_that_the_page_names_exist() -> None:
    known: set[str] = set().union(*(names_in(ROOT / path) for path in modules()))
    classes = {name for name in known if "." not in name}
    named = {match[0] for match in METHOD.finditer(DESIGN) if match[1] in classes}
    assert len(named) > 30
    assert named <= known, (
        f"docs/design.md names methods that were renamed or removed: {sorted(named - known)}"
    )


def test_the_table_of_slot_fields_matches_the_code() -> None:
    assert layout.table().strip() in DESIGN
