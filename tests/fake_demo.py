"""Run the demo against fake engines, with short pauses: `python -m tests.fake_demo BUILD_FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from examples.demo import course, main, server


def fake_command(model: Path, engine: server.Engine) -> list[str | Path]:
    """Return the command that starts a fake engine instead of vLLM."""
    return [sys.executable, "-m", "tests.fake_engine", str(engine.port)]


def run(build: Path) -> int:
    """Run the whole demo; only the engines and the pauses are replaced."""
    model = build / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    main.BUILD, main.MODEL, main.ROOT, course.IDLE_SECONDS = build, model, build, 0.5
    server.command = fake_command
    server.BUDGET, server.SPARE, server.LOWERED = server.SIZES["bfloat16"]  # on every processor
    return main.main()


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
