"""Check that a name with a signature exists in Python source. The source is read, never imported.

A seam is a name in an engine's code that a plugin relies on: (module, qualname, parameters, kind). `kind` is
`function`, `class` or `attribute`; an attribute may be a variable, a field, a property, or set on `self` by
any method. Names are followed through imports and base classes inside the source.
"""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol

Function = ast.FunctionDef | ast.AsyncFunctionDef


class SeamLike(Protocol):
    """The attributes of a plugin's seams.Seam."""

    @property
    def module(self) -> str: ...
    @property
    def qualname(self) -> str: ...
    @property
    def parameters(self) -> Sequence[str]: ...
    @property
    def kind(self) -> str: ...


class Found(NamedTuple):
    """A definition and the module that contains it."""

    module: str
    node: ast.AST


class Source:
    """The modules of a wheel or of an unpacked folder; a module is parsed at its first use."""

    def __init__(self, path: Path) -> None:
        """Open a wheel (a zip file) or a folder; raises FileNotFoundError or zipfile.BadZipFile."""
        self._folder = path if path.is_dir() else None
        self._archive = None if path.is_dir() else zipfile.ZipFile(path)
        self.module = lru_cache(maxsize=None)(self._module)

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._archive is not None:
            self._archive.close()

    def _module(self, name: str) -> ast.Module | None:
        """Return the syntax tree of a module, or None where there is no such module."""
        stem = name.replace(".", "/")
        for member in (f"{stem}.py", f"{stem}/__init__.py"):
            text = self._read(member)
            if text is not None:
                return ast.parse(text, filename=member)
        return None

    def is_package(self, name: str) -> bool:
        """Say whether a module is the __init__ of a package."""
        return self._read(f"{name.replace('.', '/')}/__init__.py") is not None

    def _read(self, member: str) -> bytes | None:
        if self._folder is not None:
            path = self._folder / member
            return path.read_bytes() if path.is_file() else None
        assert self._archive is not None
        try:
            return self._archive.read(member)
        except KeyError:
            return None


def seams(engine: str) -> Sequence[SeamLike]:
    """Return the seams that the plugin of an engine declares; raises ImportError if there is none."""
    declared: Sequence[SeamLike] = import_module(f"{engine}_kvcached.seams").SEAMS
    return declared


def check_seam(source: Source, seam: SeamLike) -> str:
    """Return the problem of a seam in this source, or an empty string."""
    if source.module(seam.module) is None:
        return f"there is no module {seam.module}"
    found = _resolve(source, seam.module, seam.qualname)
    if found is None:
        return f"there is no {seam.qualname} in {seam.module}"
    if seam.kind == "attribute":
        return ""
    if seam.kind == "class" and not isinstance(found.node, ast.ClassDef):
        return f"{seam.qualname} is no class"
    if seam.kind == "function" and not isinstance(found.node, Function):
        return f"{seam.qualname} is no function"
    return _missing_parameters(source, found, seam)


def _missing_parameters(source: Source, found: Found, seam: SeamLike) -> str:
    names, takes_any = _parameters(source, found)
    lacking = [p for p in seam.parameters if p not in names]
    if not lacking or takes_any:
        return ""
    return f"{seam.qualname} does not accept {', '.join(lacking)}; it takes {', '.join(names) or 'nothing'}"


def _parameters(source: Source, found: Found) -> tuple[list[str], bool]:
    """Return the names that a function or a class's constructor accepts, and whether it accepts any name."""
    node = found.node
    if isinstance(node, ast.ClassDef):
        init = _member(source, found, "__init__")
        if init is None:
            return _fields(source, found), False
        node = init.node
    if not isinstance(node, Function):
        return [], False
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [a.arg for a in given], node.args.kwarg is not None


def _fields(source: Source, found: Found) -> list[str]:
    """Return the annotated fields of a class and its bases: the parameters of a dataclass's constructor."""
    assert isinstance(found.node, ast.ClassDef)
    names = [name for base in _bases(source, found) for name in _fields(source, base)]
    own = [s.target for s in found.node.body if isinstance(s, ast.AnnAssign)]
    return names + [target.id for target in own if isinstance(target, ast.Name)]


def _resolve(source: Source, module: str, qualname: str) -> Found | None:
    first, *rest = qualname.split(".")
    found = _top_level(source, module, first, frozenset())
    for name in rest:
        if found is None or not isinstance(found.node, ast.ClassDef):
            return None
        found = _member(source, found, name)
    return found


def _top_level(source: Source, module: str, name: str, seen: frozenset[str]) -> Found | None:
    """Find a name in a module; follow `from ... import` to the module that defines it."""
    tree = source.module(module)
    if tree is None or module in seen:
        return None
    for node in _statements(tree.body):
        if name in _defined(node):
            return Found(module, node)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    origin = _origin(source, module, node)
                    inner = _top_level(source, origin, alias.name, seen | {module})
                    return inner or (Found(module, node) if source.module(origin) is None else None)
    return None


def _origin(source: Source, module: str, node: ast.ImportFrom) -> str:
    """Return the absolute module of a `from ... import`."""
    if not node.level:
        return node.module or ""
    # one level is the package that the module is in; an __init__ is its own package
    above = node.level - source.is_package(module)
    parts = module.split(".")[: len(module.split(".")) - above]
    return ".".join([*parts, node.module] if node.module else parts)


def _member(source: Source, owner: Found, name: str) -> Found | None:
    """Find a name in a class: its body, the attributes that its methods set on `self`, then its bases."""
    assert isinstance(owner.node, ast.ClassDef)
    for node in _statements(owner.node.body):
        if name in _defined(node):
            return Found(owner.module, node)
    for inner in ast.walk(owner.node):
        if isinstance(inner, ast.Attribute) and _is_set_on_self(inner, name):
            return Found(owner.module, inner)
    for base in _bases(source, owner):
        found = _member(source, base, name)
        if found is not None:
            return found
    return None


def _is_set_on_self(node: ast.Attribute, name: str) -> bool:
    is_self = isinstance(node.value, ast.Name) and node.value.id == "self"
    return is_self and node.attr == name and isinstance(node.ctx, ast.Store)


def _bases(source: Source, owner: Found) -> Iterator[Found]:
    assert isinstance(owner.node, ast.ClassDef)
    for base in owner.node.bases:
        plain = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(plain, ast.Name):
            found = _top_level(source, owner.module, plain.id, frozenset())
            if found is not None and isinstance(found.node, ast.ClassDef) and found.node is not owner.node:
                yield found


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, including statements under `if`, `try` and `with`."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(node, part, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from _statements(handler.body)


def _defined(node: ast.stmt) -> set[str]:
    """Return the names that a statement defines."""
    if isinstance(node, Function | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {n.id for t in targets if t is not None for n in ast.walk(t) if isinstance(n, ast.Name)}
