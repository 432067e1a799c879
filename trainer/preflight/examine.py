"""All checks in their order; one whose preparation failed is skipped."""

from __future__ import annotations

import time
from collections.abc import Callable

from trainer.preflight import job, network
from trainer.preflight.report import REFUSED, REMEDIES, Failed, Result, Subject

CHECKS: dict[str, tuple[Callable[[Subject], str], tuple[str, ...]]] = {
    "environment": (job.check_environment, ()),
    "configuration": (job.check_configuration, ()),
    "launch script": (job.check_launch_script, ()),
    "run directory": (job.check_run_directory, ("run",)),
    "clock": (job.check_clock, ("run",)),
    "space": (job.check_space, ("run",)),
    "memory": (job.check_memory, ("run",)),
    "data": (network.check_data, ("run",)),
    "statistics": (network.check_statistics, ("dataset",)),
    "wind scan": (network.check_scan, ("dataset",)),
    "initial weights": (network.check_weights, ("run",)),
    "initialisation": (network.check_initialisation, ("model",)),
    "resume": (network.check_resume, ("dataset", "model")),
    "first loss": (network.check_first_loss, ("dataset", "model")),
    "sensitivity": (network.check_sensitivity, ("dataset", "model")),
    "step": (network.check_step, ("dataset", "model")),
    "checkpoint": (network.check_checkpoint, ("engine",)),
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
