"""docs/kvctl.md and its pictures are current."""

from __future__ import annotations

from kvctl.command_definitions import COMMANDS, COMMON
from tools.kvctl_reference import DOCS, SIZES, pictures, reference, text_of

REDO = "stale: run python -m tools.kvctl_reference"


def test_the_page_is_current() -> None:
    assert (DOCS / "kvctl.md").read_text() == reference(), REDO


def test_the_page_has_every_command_and_option() -> None:
    page = (DOCS / "kvctl.md").read_text()
    for command in COMMANDS:
        assert f"## kvctl {command.name}\n" in page
        assert all(f"`{each.usage}`".replace("|", "\\|") in page for each in (*command.arguments, *COMMON))


def test_the_pictures_are_current() -> None:
    for name, svg in pictures().items():
        assert text_of((DOCS / name).read_text()) == text_of(svg), REDO
        shown = "".join(text_of(svg))
        assert (
            "GPU Memory Usage" in shown and "mistral-7b" in shown and len(text_of(svg)) > SIZES[name][1] / 4
        )
