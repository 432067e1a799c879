"""All checks in their order; one whose preparation failed is skipped."""

from __future__ import annotations

import time
from collections.abc import Callable

from trainer.preflight.job import (
    check_clock,
    check_configuration,
    check_environment,
    check_launch_script,
    check_memory,
    check_run_directory,
    check_space,
)
from trainer.preflight.network import (
    check_checkpoint,
    check_data,
    check_first_loss,
    check_initialisation,
    check_resume,
    check_scan,
    check_sensitivity,
    check_statistics,
    check_step,
    check_weights,
)
from trainer.preflight.report import REFUSED, REMEDIES, Failed, Result, Subject

CHECKS: dict[str, tuple[Callable[[Subject], str], tuple[str, ...]]] = {
    "environment": (check_environment, ()),
    "configuration": (check_configuration, ()),
    "launch script": (check_launch_script, ()),
    "run directory": (check_run_directory, ("run",)),
    "clock": (check_clock, ("run",)),
    "space": (check_space, ("run",)),
    "memory": (check_memory, ("run",)),
    "data": (check_data, ("run",)),
    "statistics": (check_statistics, ("dataset",)),
    "wind scan": (check_scan, ("dataset",)),
    "initial weights": (check_weights, ("run",)),
    "initialisation": (check_initialisation, ("model",)),
    "resume": (check_resume, ("dataset", "model")),
    "first loss": (check_first_loss, ("dataset", "model")),
    "sensitivity": (check_sensitivity, ("dataset", "model")),
    "step": (check_step, ("dataset", "model")),
    "checkpoint": (check_checkpoint, ("engine",)),
}


def examine(subject: Subject) -> list[Result]:
    """Run every check; one whose preparation failed is skipped."""
    results = []
    for name, (check, needs) in CHECKS.items():
        started = time.monotonic()
        if not all(hasattr(subject, need) for need in needs):
            results.append(Result(name, "skipped", f"needs {' and '.join(needs)}"))
            continue
        try:
            state, found, remedy = "pass", check(subject), ""
        except Failed as failed:
            state, found, remedy = "FAIL", str(failed), failed.remedy
        except REFUSED as refusal:
            state, found, remedy = "FAIL", str(refusal), REMEDIES.get(type(refusal), "as the message says")
        results.append(Result(name, state, found, remedy, time.monotonic() - started))  # type: ignore[arg-type]
    return results
