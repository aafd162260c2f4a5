"""The demo against the fake engine, with short pauses: `python -m tests.fake_demo BUILD_FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from examples.demo import main, server


def fake_command(model: Path, place: server.Place) -> list[str | Path]:
    """Return what is started instead of vLLM."""
    return [sys.executable, "-m", "tests.fake_engine", str(place.port)]


def run(build: Path) -> int:
    """Run the whole demo; everything but engine and pauses is the real thing."""
    model = build / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    main.BUILD, main.MODEL, main.ROOT, main.IDLE_SECONDS = build, model, build, 0.5
    server.command = fake_command
    return main.main()


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
