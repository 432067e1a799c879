"""Sums -> scores as JSON values, a number or None where there was nothing to score (docs/verification.md)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from trainer.scores.errors import ErrorSums, normalised_loss
from trainer.verification.days import RATIOS, SYSTEMS
from trainer.verification.pieces import Sums
from trainer.verification.standards import CLASSES, Limit
from trainer.verification.tally import AT_STATIONS, MAPS, Setting

INTERVAL = "95 %, local days drawn with replacement 1000 times"
BASELINES = (
    "persistence; climatology: means of the training split by hour, and month where it has 20 days of it; mix: climatology and "
    "the share of the analysis' anomaly that fits the training split best"
)
MAP_NAMES = ("rmse", "skill")


def summary(setting: Setting, sums: Sums, t: np.ndarray, lead: np.ndarray) -> dict[str, Any]:
    """All scores of an evaluation.

    Args:
        t, lead: (n,) time index and lead time of every sample, in the order in which they were scored.
    """
    errors = _restored(setting, sums["errors"], tuple(setting.baselines))
    daily = _restored(setting, sums["daily_errors"], ("persistence",))
    names = list(setting.regions)
    return {
        "baseline": BASELINES,
        "interval": INTERVAL,
        "loss": normalised_loss(errors, setting.dataset.normalizer),
        "scores": _scores(setting, errors, 0),
        "regions": {
            name: {"cells": int(setting.regions[name].sum()), "scores": _scores(setting, errors, row)}
            for row, name in enumerate(names)
            if row
        },
        "hourly_events": _events(setting, setting.hourly_limits, sums["hourly_events"]),
        "daily": {
            "days": int((sums["daily_errors"][daily.kinds.index("weight")].sum((0, 1, 2)) > 0).sum()),
            "scores": _scores(setting, daily, 0),
            "events": _events(setting, setting.limits, sums["daily_events"]),
            "reliability": _reliability(setting, sums["reliability"]),
            "indices": _indices(setting, sums),
        },
        "spectra": _spectra(setting, sums),
        "diurnal": _diurnal(setting, sums["diurnal"]),
        **_stations(setting, sums),
        "cases": _cases(setting, sums["case_loss"], sums["case_known"], t, lead),
    }


def maps(setting: Setting, sums: Sums) -> dict[str, np.ndarray]:
    """(T, L, H, W) float32 each: RMSE in the units of the target, and skill against persistence; NaN where nothing was
    scored."""
    squared, unchanged, comparable, weight = (sums["maps"][MAPS.index(name)] for name in MAPS)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {"rmse": np.sqrt(squared / weight), "skill": 1.0 - comparable / unchanged}
    outside = ~setting.regions["domain"]
    for values in found.values():
        values[..., outside] = np.nan
    return {name: found[name].astype("f4") for name in MAP_NAMES}


def _restored(setting: Setting, sums: np.ndarray, baselines: tuple[str, ...]) -> ErrorSums:
    counts = len(setting.regions), setting.days
    restored = ErrorSums(len(setting.targets), setting.lead_hours, torch.device("cpu"), baselines, *counts)
    restored.sums = torch.from_numpy(sums)
    return restored


def _scores(setting: Setting, errors: ErrorSums, region: int) -> dict[str, dict[str, dict[str, Any]]]:
    """{pollutant: {lead: {score: number}}}."""
    table = errors.table(region) | errors.intervals(region)
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for row, name in enumerate(setting.targets):
        units = setting.dataset.store.contents.variable(name).units
        scores[name] = {}
        for column, lead in enumerate(setting.lead_hours):
            numbers = {kind: _number(values[row, column]) for kind, values in table.items()}
            scores[name][f"{lead}h"] = {"units": units, **numbers}
    return scores


def _stations(setting: Setting, sums: Sums) -> dict[str, Any]:
    """Scores against what was measured, of the forecast and of the reanalysis that it was trained on."""
    if setting.stations is None:
        return {}
    errors = ErrorSums(len(setting.targets), setting.lead_hours, torch.device("cpu"), AT_STATIONS, 1, setting.days)
    errors.sums = torch.from_numpy(sums["stations"])
    counted = {"stations": len(setting.stations.stations), **setting.stations.counted}
    return {"stations": {"counted": counted, "scores": _scores(setting, errors, 0)}}


def _events(setting: Setting, limits: Sequence[Limit], counts: np.ndarray) -> list[dict[str, Any]]:
    """Of every limit: {region: {lead: {forecast, persistence: scores}}}."""
    found = []
    for number, limit in enumerate(limits):
        regions = {
            region: {
                f"{lead}h": {name: event_scores(counts[number, s, column, row]) for s, name in enumerate(SYSTEMS)}
                for column, lead in enumerate(setting.lead_hours)
            }
            for row, region in enumerate(setting.regions)
        }
        found.append({**_described(limit), "regions": regions})
    return found


def _described(limit: Limit) -> dict[str, Any]:
    return {
        "standard": limit.standard,
        "averaging": limit.averaging,
        "pollutant": limit.pollutant,
        "limit": limit.value,
        "units": "ug m-3",
    }


def event_scores(counts: Iterable[float]) -> dict[str, float | None]:
    """Of the weights of neither, false alarms, misses and hits: base rate, POD, FAR, CSI, ETS and frequency bias (Jolliffe and
    Stephenson, Forecast Verification, 2012, chapter 3)."""
    neither, false, missed, hit = (float(x) for x in counts)
    total = neither + false + missed + hit
    by_chance = (hit + missed) * (hit + false) / total if total else math.nan
    return {
        "base_rate": _ratio(hit + missed, total),
        "pod": _ratio(hit, hit + missed),
        "far": _ratio(false, hit + false),
        "csi": _ratio(hit, hit + missed + false),
        "ets": _ratio(hit - by_chance, hit + missed + false - by_chance),
        "frequency_bias": _ratio(hit + false, hit + missed),
    }


def _reliability(setting: Setting, sums: np.ndarray) -> list[dict[str, Any]]:
    """How often a limit was exceeded, by the ratio of the forecast to it."""
    edges = [0.0, *RATIOS, None]
    found = []
    for number, limit in enumerate(setting.limits):
        leads = {}
        for column, lead in enumerate(setting.lead_hours):
            weights, exceeded = sums[number, column].T
            shares = [_ratio(*pair) for pair in zip(exceeded, weights, strict=True)]
            leads[f"{lead}h"] = {"share": shares, "weight": [_ratio(w, weights.sum()) for w in weights]}
        found.append({**_described(limit), "ratio_edges": edges, "leads": leads})
    return found


def _indices(setting: Setting, sums: Sums) -> list[dict[str, Any]]:
    parts, found = [sums[name] for name in ("index_errors", "index_classes", "primary")], []
    for number, index in enumerate(setting.indices):
        regions = {
            region: {
                f"{lead}h": {
                    name: _index_scores(*(part[number, s, column, row] for part in parts)) for s, name in enumerate(SYSTEMS)
                }
                for column, lead in enumerate(setting.lead_hours)
            }
            for row, region in enumerate(setting.regions)
        }
        made_of = [name for name in setting.targets if name in index.breaks]
        found.append({"standard": index.standard, "pollutants": made_of, "classes": list(CLASSES), "regions": regions})
    return found


def _index_scores(errors: np.ndarray, classes: np.ndarray, primary: np.ndarray) -> dict[str, Any]:
    weight, error, absolute = (float(x) for x in errors)
    near = sum(float(np.trace(classes, offset)) for offset in (-1, 0, 1))
    return {
        "bias": _ratio(error, weight),
        "mae": _ratio(absolute, weight),
        "class_right": _ratio(float(np.trace(classes)), weight),
        "class_within_one": _ratio(near, weight),
        "primary_right": _ratio(float(primary[1]), float(primary[0])),
        "class_shares": [[_ratio(x, weight) for x in row] for row in classes],  # truth, forecast
    }


def _spectra(setting: Setting, sums: Sums) -> dict[str, Any]:
    found: dict[str, Any] = {"wavelength_km": setting.spectra.wavelengths, "pollutants": {}}
    for row, name in enumerate(setting.targets):
        found["pollutants"][name] = {
            f"{lead}h": {
                kind: [_ratio(x, sums["spectra_samples"][column]) for x in sums["spectra"][place, row, column]]
                for place, kind in enumerate(("truth", "forecast"))
            }
            for column, lead in enumerate(setting.lead_hours)
        }
    return found


def _diurnal(setting: Setting, sums: np.ndarray) -> dict[str, Any]:
    """Means by local hour of the valid time."""
    weight, *parts = sums
    return {
        region: {
            name: {
                f"{lead}h": {
                    kind: [_ratio(*pair) for pair in zip(part[row, column, place], weight[row, column, place], strict=True)]
                    for kind, part in zip(("bias", "truth", "forecast"), parts, strict=True)
                }
                for column, lead in enumerate(setting.lead_hours)
            }
            for row, name in enumerate(setting.targets)
        }
        for place, region in enumerate(setting.regions)
    }


def _cases(setting: Setting, losses: np.ndarray, known: np.ndarray, t: np.ndarray, lead: np.ndarray) -> list[dict[str, Any]]:
    """Best, median and worst forecast of the lead time nearest to 24 h, by the squared error in normalised units.

    Of those whose truth has at least half of the cells that the fullest one has: where little is known, little is wrong.
    """
    chosen = min(set(lead.tolist()), key=lambda hours: abs(hours - 24))
    among = np.flatnonzero((lead == chosen) & (known >= 0.5 * known[lead == chosen].max()))
    order = among[np.argsort(losses[among], kind="stable")]
    places = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    times = setting.dataset.store.times
    return [
        {"which": which, "analysis": str(times[t[place]]), "lead_hours": chosen, "loss": float(losses[place])}
        for which, place in places.items()
    ]


def _ratio(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole else None


def _number(value: Any) -> float | None:
    return None if math.isnan(float(value)) else float(value)
