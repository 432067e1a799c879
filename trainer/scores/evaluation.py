"""Errors and skill of a trained network on held-out days, in physical units."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from data.variables import Variable
from trainer.dataset import open_climatology
from trainer.forecaster import Forecaster
from trainer.scores.errors import ErrorSums, normalised_loss
from trainer.scores.scoring import score


def evaluate(forecaster: Forecaster, split: str, samples: int | None) -> dict[str, Any]:
    """Score on `split` ("validation", "test"): all samples, or `samples` spread evenly over it.

    Returns:
        JSON values: identity of checkpoint, data and scan beside {pollutant: {lead: {metric: number}}}.
    """
    dataset = forecaster.dataset
    index, times = dataset.index(split), dataset.store.times
    numbers = np.arange(len(index)) if samples is None else index.evenly(samples)
    micro = forecaster.run.batch.micro
    batches = dataset.stream(index).listed(numbers, micro)
    shown = track(batches, "evaluating", total=-(-len(numbers) // micro), console=Console(stderr=True))
    sums = score(forecaster.model, shown, dataset, by_day=True, usual=dataset.usual or open_climatology(dataset))
    return {
        "checkpoint": str(forecaster.checkpoint),
        "step": forecaster.manifest.step,
        "fingerprints": dataset.fingerprints(),
        "split": split,
        "samples": len(numbers),
        "period": [str(times[index.t.min()]), str(times[index.t.max()])],
        "loss": normalised_loss(sums, dataset.normalizer),
        "baseline": "persistence; climatology: means of the training split by hour, and month where it has 20 days of it",
        "interval": "95 %, days drawn with replacement 1000 times",
        "weather": given_weather(forecaster),
        "scores": _by_pollutant(sums, [dataset.store.contents.variable(name) for name in dataset.normalizer.targets]),
    }


def given_weather(forecaster: Forecaster) -> str:
    """What a score must say of the weather that the forecast was made with."""
    future = forecaster.run.data.future
    return f"perfect (analysed) at the valid time: {', '.join(future)}" if future else "of the analysis"


def _by_pollutant(sums: ErrorSums, targets: list[Variable]) -> dict[str, dict[str, dict[str, Any]]]:
    table = sums.table()
    table["skill_low"], table["skill_high"] = sums.skill_interval()
    table["climatology_skill_low"], table["climatology_skill_high"] = sums.skill_interval("climatology")
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for row, variable in enumerate(targets):
        scores[variable.name] = {}
        for column, lead in enumerate(sums.lead_hours):
            numbers = {kind: _number(values[row, column]) for kind, values in table.items()}
            scores[variable.name][f"{lead}h"] = {"units": variable.units, **numbers}
    return scores


def _number(value: Any) -> float | None:
    return None if math.isnan(float(value)) else float(value)
