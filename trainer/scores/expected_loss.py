"""Is the starting loss the one that was promised? The step-0 gate.

When it refuses, it scores the same samples again without the bias and in the other scan modes, and compares what was
recorded beside the weights, so that the message names the cause that fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.checkpoint.manifest import CheckpointError, read_json
from trainer.dataset import Dataset
from trainer.scores.scoring import validation_loss
from trainer.weights.reading import wanted


def require_expected(engine: Any, dataset: Dataset, val_loss: float) -> None:
    """Compare the validation loss before step 1 with `expect`; collective.

    Raises:
        CheckpointError: on every rank, outside the tolerance; says which of the usual causes fits.
    """
    expect = dataset.run.expect
    if expect is None or abs(val_loss - expect.val_loss) <= expect.tolerance:
        return
    engine.eval()
    findings = _from_other_inputs(engine, dataset, val_loss)
    if dist.get_rank() == 0:  # what it wrote may not be visible to others yet
        findings = [*_from_the_weights(dataset), *findings]
    listed = "\n".join(f"  - {finding}" for finding in findings)
    raise CheckpointError(
        f"step-0 validation loss is {val_loss:.4f}, expected {expect.val_loss} +- {expect.tolerance}; nothing was trained. "
        f"The usual causes, and what was found:\n{listed}"
    )


def _from_the_weights(dataset: Dataset) -> list[str]:
    """What the file that the weights came from, and the notes beside it, say."""
    run = dataset.run
    if run.init_from is None:
        return ["weights not loaded: init_from is not set, so the network starts from random numbers. THIS FITS"]
    share = read_json(run.run_dir / "import.json")["share_loaded"]
    findings = [f"weights not loaded: {100 * share:.2f} % of the parameters came from {run.init_from.path}"]
    recorded = wanted(run.init_from).record
    if recorded is None or not recorded.statistics:
        return [*findings, "other statistics, another wind-scan cache: the file records neither, so neither can be excluded"]
    ours = dataset.store.statistics
    differing = []
    for name, numbers in recorded.statistics.items():
        moved = name in ours and max(abs(numbers[k] - ours[name][k]) for k in ("mean", "std"))
        if moved > 1e-6 * numbers["std"]:
            differing.append(name)
    findings.append(f"other statistics: {f'{differing} differ. THIS FITS' if differing else 'they are the same'}")
    orders = [each["wind_scan_orders"] for each in (recorded.fingerprints, dataset.fingerprints())]
    changed = f"orders {orders[0][:12]} then, {orders[1][:12]} now. THIS FITS"
    same = "the orders are the same"
    findings.append(f"another wind-scan cache: {same if orders[0] == orders[1] else changed}")
    return findings


def _from_other_inputs(engine: Callable[..., Tensor], dataset: Dataset, val_loss: float) -> list[str]:
    """What the loss is without the bias and with other scans; collective."""
    run, expect, findings = dataset.run, dataset.run.expect, []
    assert expect is not None
    variants = {}
    if not run.wind_scan.of_old_code:
        if run.model.elevation_bias != "none" and not run.elevation_as_given:
            variants["without the elevation bias"] = replace(dataset, elevation=torch.zeros_like(dataset.elevation))
        modes = ("none", "global", "regional") if dataset.scan is not None else ()
        for mode in modes:
            if mode != run.wind_scan.mode:
                other = run.model_copy(update={"wind_scan": run.wind_scan.model_copy(update={"mode": mode})})
                variants[f"with wind_scan.mode {mode}"] = replace(dataset, run=other)
    for name, variant in variants.items():
        loss = validation_loss(engine, variant)
        finding = f"{name} the loss is {loss:.4f}"
        if abs(loss - expect.val_loss) <= expect.tolerance:
            finding += ". THIS FITS: the weights were trained so"
        elif abs(loss - val_loss) < 1e-6 * abs(val_loss):
            finding += ": it cannot act"
        findings.append(finding)
    return findings
