"""The whole ledger against a plain model. KVCACHED_LEDGER_EXAMPLES and _STEPS make the run longer."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from devkit.report import record
from tests.ledger.machine import LedgerMachine

EXAMPLES = int(os.environ.get("KVCACHED_LEDGER_EXAMPLES", "1000"))
STEPS = int(os.environ.get("KVCACHED_LEDGER_STEPS", "50"))


def test_i1_to_i11_hold_after_every_step_of_any_history_and_nobody_starves_at_its_end() -> None:
    quiet = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)
    run_state_machine_as_test(
        LedgerMachine, settings=settings(quiet, max_examples=EXAMPLES, stateful_step_count=STEPS)
    )
    record("ledger.steps", LedgerMachine.steps)
    record("ledger.examples", LedgerMachine.examples)
    record("ledger.settled", LedgerMachine.settled)
    assert LedgerMachine.settled >= EXAMPLES
