"""Draw results: `python -m benchmarks.plots RESULT.json ...` writes a PNG beside each known file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.plots import engines, ledger, reclaim, shared_budget

PICTURES = engines.PICTURES | ledger.PICTURES
FILES = {"sharing": reclaim.draw_file, "reclaim": reclaim.draw_file, "shared_budget": shared_budget.draw_file}


def main() -> None:
    """Draw every given file that has a picture; the file's name selects it."""
    for name in sys.argv[1:]:
        path = Path(name)
        if path.stem in FILES:
            FILES[path.stem](path)
        elif path.stem in PICTURES:
            PICTURES[path.stem](json.loads(path.read_text()), path.with_suffix(".png"))
        else:
            known = ", ".join([*PICTURES, *FILES])
            print(f"{path}: no picture is known for this name; known are {known}", file=sys.stderr)


if __name__ == "__main__":
    main()
