"""Write docs/kvctl.md and the pictures of kvtop: `python -m tools.kvctl_reference`.

The page is made from the commands' help texts and the template kvctl_reference.md beside this file. A test
fails if the page is stale.
"""

from __future__ import annotations

import asyncio
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from devkit.ledger_scene import CAST, play, sampler
from kvcached_core.ledger import Runtime
from kvcached_core.ledger.tools.metric_definitions import DEVICE_METRICS, DURATION_METRICS, ENGINE_METRICS
from kvctl.command_definitions import COMMANDS, COMMON, EXIT_CODES, Argument, Command
from kvctl.kvtop.app import TopApp
from kvctl.kvtop.screen import ViewState
from kvctl.kvtop.widgets import HELP
from kvctl.metrics import PREFIX, READABLE, READABLE_HELP

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TEMPLATE = Path(__file__).with_suffix(".md")
SIZES = {"kvtop-80x24.svg": (80, 24), "kvtop-200x60.svg": (200, 60)}


def reference() -> str:
    """Return the text of docs/kvctl.md."""
    parts = {
        "codes": "".join(f"| {code} | {text} |\n" for code, text in EXIT_CODES),
        "common": _arguments(COMMON),
        "commands": "".join(_command(command) for command in COMMANDS),
        "help": HELP.rsplit("\n", 2)[0],
        "metrics": _metrics(),
    }
    return re.sub("<<([a-z]+)>>", lambda match: parts[match[1]], TEMPLATE.read_text()).rstrip("\n") + "\n"


def _command(command: Command) -> str:
    synopsis = " ".join(
        ["kvctl", command.name, *(f"[{a.usage.split(', ')[-1]}]" for a in command.arguments if a.is_option),
         *(a.usage for a in command.arguments if not a.is_option)]
    )  # fmt: skip
    width = max(len(line) for line, _ in command.examples)
    examples = "\n".join(f"{line:<{width}}  # {text}".removesuffix("  # ") for line, text in command.examples)
    rows = f"{_arguments(command.arguments)}\n" if command.arguments else ""
    head = f"## kvctl {command.name}\n\n`{synopsis}`\n\n{command.description}\n\n"
    return f"{head}{rows}```bash\n{examples}\n```\n\n"


def _arguments(arguments: tuple[Argument, ...]) -> str:
    rows = [f"| `{each.usage.replace('|', chr(92) + '|')}` | {each.help} |" for each in arguments]
    return "\n".join(["| argument | meaning |", "|---|---|", *rows]) + "\n"


def _metrics() -> str:
    def rows() -> Iterator[str]:
        yield f"| {READABLE} | gauge | none | {READABLE_HELP} |"
        for device in DEVICE_METRICS:
            yield f"| {PREFIX}{device.name} | gauge | device | {device.help} |"
        for engine in ENGINE_METRICS:
            kind = "counter" if engine.counter else "gauge"
            yield f"| {PREFIX}{engine.name} | {kind} | engine | {engine.help} |"
        for time in DURATION_METRICS:
            yield f"| {PREFIX}{time.name} | histogram | engine | {time.help} |"

    head = ("| metric | type | labels | meaning |", "|---|---|---|---|")
    labels = (
        "`device` means the labels `gpu` and `UUID`; `engine` adds `engine`, `model`, `name` and `rank`.\n"
    )
    return "\n".join([*head, *rows()]) + "\n\n" + labels


def pictures() -> Mapping[str, str]:
    """Return pictures of kvtop that show a made-up machine: SVG text by file name."""
    with tempfile.TemporaryDirectory() as folder:
        runtime = Runtime.open(Path(folder) / "runtime")
        accounts = play(runtime)
        assert len(accounts) == len(CAST)
        return {name: asyncio.run(_picture(runtime, size)) for name, size in SIZES.items()}


async def _picture(runtime: Runtime, size: tuple[int, int]) -> str:
    app = TopApp(runtime, sampler(runtime), ViewState())
    async with app.run_test(size=size) as pilot:
        await pilot.press("down", "space")
        return app.export_screenshot()


def text_of(svg: str) -> list[str]:
    """Return the texts in a picture; unlike the rest of it, they do not depend on Textual's version."""
    return [text.replace("&#160;", " ") for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def main() -> int:
    """Write the page and the pictures."""
    (DOCS / "kvctl.md").write_text(reference())
    for name, svg in pictures().items():
        (DOCS / name).write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
