"""docs/hooks.md describes every hook and every kind of event, and its examples run."""

from __future__ import annotations

import inspect
import re

import pytest

from kvcached_core import events
from kvcached_core.hooks import Specs
from tools.wheels import ROOT

PAGE = (ROOT / "docs" / "hooks.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
HOOKS = {name: function for name, function in vars(Specs).items() if name.startswith("kvcached_")}


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(example: str) -> None:
    exec(compile(example, "docs/hooks.md", "exec"), {})


def test_every_hook_has_an_example() -> None:
    for name in HOOKS:
        assert any(f"def {name}(" in example for example in EXAMPLES), name
    assert len(EXAMPLES) == 1 + len(HOOKS)


@pytest.mark.parametrize("name", HOOKS)
def test_the_signature_of_a_hook_is_on_the_page(name: str) -> None:
    signature = inspect.signature(HOOKS[name])
    parameters = ", ".join(str(p).replace("'", "") for p in signature.parameters.values() if p.name != "self")
    result = str(signature.return_annotation).replace("'", "")
    assert f"## {name}\n\n```\n{name}({parameters}) -> {result}\n```\n" in PAGE


def test_the_page_and_the_module_name_the_same_data_for_every_kind_of_event() -> None:
    assert events.__doc__ is not None
    in_module = dict(re.findall(r"^\| (\w+) \| [^|]+ \| ([a-z_, ]+) \|$", events.__doc__, re.MULTILINE))
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([a-z_, `]+) \|$", PAGE, re.MULTILINE)
    on_page = {kind: data.replace("`", "") for kind, data in rows}
    assert on_page.keys() == events.KINDS
    assert on_page == {kind: in_module[kind] for kind in on_page}
