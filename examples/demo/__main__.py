"""Run the demo: `python -m examples.demo`."""

import sys

from examples.demo.main import main

sys.exit(main())
