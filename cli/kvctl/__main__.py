"""`python -m kvctl`."""

from __future__ import annotations

import sys

from kvctl.main import main

sys.exit(main())
