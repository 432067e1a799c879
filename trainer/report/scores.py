"""Pictures of an evaluation: skill and RMSE over lead time, maps, scales, hours of the day, limits and classes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from data.store.layout import Store
from trainer.report.runs import LABELS, aspect_of, draw_map, spread, write

matplotlib.use("Agg")
STYLES = {"persistence": ("C1", "s--"), "climatology": ("C2", "^:"), "mix": ("C4", "d-."), "against": ("C0", "v--")}


def plot_skill(evaluation: dict[str, Any], out: Path) -> None:
    """Skill against each baseline over lead time, with its interval."""
    figure, panels = _panels(evaluation["scores"])
    for panel, (name, leads) in zip(panels, evaluation["scores"].items(), strict=True):
        hours = _hours(leads)
        for place, (baseline, (colour, _)) in enumerate(_styles(leads).items()):
            kind = "skill" if baseline == "persistence" else f"{baseline}_skill"
            skill, low, high = (_values(leads, key) for key in (kind, f"{kind}_low", f"{kind}_high"))
            at = np.arange(len(hours)) + 0.12 * (place - 1)
            panel.errorbar(
                at, skill, [skill - low, high - skill], fmt="o", color=colour, capsize=3, label=f"against {baseline}"
            )
        panel.axhline(0, color="0.4", lw=0.8)
        panel.set(title=LABELS.get(name, name), xticks=range(len(hours)), xticklabels=hours)
    _finish(figure, panels, evaluation, "skill = 1 - MSE / MSE of the baseline, 95 % intervals", out)


def plot_errors(evaluation: dict[str, Any], out: Path) -> None:
    """RMSE over lead time, beside that of the baselines."""
    figure, panels = _panels(evaluation["scores"])
    for panel, (name, leads) in zip(panels, evaluation["scores"].items(), strict=True):
        at = range(len(leads))
        panel.plot(at, _values(leads, "rmse"), "ko-", lw=2, label="forecast")
        for baseline, (colour, style) in _styles(leads).items():
            panel.plot(at, _values(leads, f"{baseline}_rmse"), style, color=colour, mfc="w", label=baseline)
        units = next(iter(leads.values()))["units"]
        panel.set(title=f"{LABELS.get(name, name)} ({units})", xticks=at, xticklabels=_hours(leads))
        panel.set_ylim(bottom=0)
    _finish(figure, panels, evaluation, "RMSE, hourly values of the domain", out)


def plot_maps(evaluation: dict[str, Any], maps: dict[str, np.ndarray], store: Store, kind: str, out: Path) -> None:
    """RMSE (one scale a pollutant), or skill against persistence (one scale for all), of every cell."""
    names, leads = list(evaluation["scores"]), list(next(iter(evaluation["scores"].values())))
    height = 3.6 * aspect_of(store) * np.ptp(store.lat) / np.ptp(store.lon)
    size = (3.6 * len(leads) + 1.2, height * len(names) + 0.6)
    figure, panels = plt.subplots(len(names), len(leads), figsize=size, squeeze=False, layout="constrained")
    for row, name in enumerate(names):
        fields = maps[kind][row]
        if kind == "skill":
            norm, colours, label = Normalize(-1.0, 1.0), "RdBu", "skill"
        else:
            norm, colours = Normalize(0.0, spread(fields, 0.0, 0.98)[1]), "viridis"
            label = f"{LABELS.get(name, name)} RMSE ({store.contents.variable(name).units})"
        for column, lead in enumerate(leads):
            image = draw_map(panels[row, column], store, fields[column], norm=norm, cmap=colours)
            panels[row, column].set(xticks=[], yticks=[])
            if row == 0:
                panels[row, column].set_title(lead)
        panels[row, 0].set_ylabel(LABELS.get(name, name))
        if kind == "rmse":
            figure.colorbar(image, ax=list(panels[row]), shrink=0.85, label=label, extend="max")
    if kind == "skill":
        figure.colorbar(image, ax=panels, shrink=0.5, label="skill against persistence", extend="min")
    write(figure, out)


def plot_spectra(evaluation: dict[str, Any], out: Path) -> None:
    """Variance of the forecasts over that of the truth, by wavelength: below 1, a scale is smoothed away."""
    spectra = evaluation["spectra"]
    figure, panels = _panels(evaluation["scores"])
    for panel, (name, leads) in zip(panels, spectra["pollutants"].items(), strict=True):
        for lead, of in leads.items():
            forecast, truth = (np.array(of[kind], float) for kind in ("forecast", "truth"))
            panel.plot(spectra["wavelength_km"], forecast / np.where(truth > 0, truth, np.nan), label=lead)
        panel.axhline(1, color="0.4", lw=0.8)
        panel.set(title=LABELS.get(name, name), xscale="log", yscale="log")
        panel.invert_xaxis()
    _finish(figure, panels, evaluation, "variance of the forecast / of the truth", out, "wavelength (km)")


def plot_diurnal(evaluation: dict[str, Any], out: Path) -> None:
    """Bias by local hour of the valid time."""
    figure, panels = _panels(evaluation["scores"])
    for panel, (name, leads) in zip(panels, evaluation["diurnal"]["domain"].items(), strict=True):
        for lead, of in leads.items():
            panel.plot(range(24), np.array(of["bias"], float), label=lead)
        panel.axhline(0, color="0.4", lw=0.8)
        units = evaluation["scores"][name][lead]["units"]
        panel.set(title=f"{LABELS.get(name, name)} ({units})", xticks=range(0, 24, 6))
    offset = evaluation["utc_offset"]
    _finish(figure, panels, evaluation, "bias by hour of the day", out, f"local hour (UTC{offset:+d})")


def plot_events(evaluation: dict[str, Any], out: Path) -> None:
    """Days above a limit: how many were forecast (POD) over how many of the forecast ones came (1 - FAR), by limit and lead."""
    figure, panel = plt.subplots(figsize=(7.5, 6), layout="constrained")
    ratio = np.linspace(0.01, 1, 200)
    for csi in (0.2, 0.4, 0.6, 0.8):
        pod = 1 / np.maximum(1 / csi - 1 / ratio + 1, 1e-9)
        panel.plot(np.where((pod > 0) & (pod <= 1), ratio, np.nan), pod, color="0.85", lw=1)
        panel.annotate(f"CSI {csi}", (0.985, 1 / (1 / csi - 1 / 0.985 + 1)), color="0.6", fontsize=7, ha="right")
    for bias in (0.5, 1.0, 2.0):
        panel.plot(ratio, bias * ratio, color="0.85", lw=1, ls="--")
    shown = 0
    for place, event in enumerate(e for e in evaluation["daily"]["events"] if _happened(e)):
        leads = event["regions"]["domain"]
        far, pod = (_values({k: s["forecast"] for k, s in leads.items()}, kind) for kind in ("far", "pod"))
        label = f"{LABELS.get(event['pollutant'], event['pollutant'])} > {event['limit']:g}, {event['standard']}"
        panel.plot(1 - far, pod, "o-", ms=4, lw=0.8, color=plt.get_cmap("tab20")(place % 20), label=label)
        panel.annotate(next(iter(leads)), (1 - far[0], pod[0]), fontsize=7)
        shown += 1
    panel.set(xlim=(0, 1), ylim=(0, 1), xlabel="success ratio (1 - FAR)", ylabel="probability of detection")
    panel.set_title("days above limits, first lead time labelled" if shown else "no day above a limit was scored")
    if shown:
        panel.legend(fontsize=7, loc="lower left")
    write(figure, out)


def plot_reliability(evaluation: dict[str, Any], out: Path) -> None:
    """How often a daily limit was exceeded, by the ratio of the forecast to it."""
    events = [e for e in evaluation["daily"]["reliability"] if _any_exceeded(e)]
    figure, panel = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for place, event in enumerate(events):
        edges = [edge for edge in event["ratio_edges"] if edge is not None]
        middles = [*(0.5 * (a + b) for a, b in pairwise(edges)), edges[-1] * 1.15]
        of = next(iter(event["leads"].values()))
        label = f"{LABELS.get(event['pollutant'], event['pollutant'])} > {event['limit']:g}, {event['standard']}"
        panel.plot(middles, np.array(of["share"], float), "o-", ms=4, color=plt.get_cmap("tab20")(place % 20), label=label)
    panel.axvline(1, color="0.4", lw=0.8)
    lead = next(iter(evaluation["daily"]["reliability"][0]["leads"])) if evaluation["daily"]["reliability"] else ""
    panel.set(xlabel=f"daily forecast of {lead} / limit", ylabel="share of cells and days above the limit", ylim=(-0.02, 1.02))
    if events:
        panel.legend(fontsize=7)
    write(figure, out)


def plot_classes(evaluation: dict[str, Any], out: Path) -> None:
    """Air-quality classes of truth and forecast of the newest index, one table a lead time."""
    index = evaluation["daily"]["indices"][-1]
    leads = index["regions"]["domain"]
    figure, panels = plt.subplots(1, len(leads), figsize=(3.6 * len(leads) + 1, 4.2), squeeze=False, layout="constrained")
    for panel, (lead, of) in zip(panels[0], leads.items(), strict=True):
        table = np.array(of["forecast"]["class_shares"], float)
        image = panel.imshow(100 * table, cmap="Blues", norm=Normalize(0, 50))
        for (truth, forecast), share in np.ndenumerate(table):
            if share >= 0.0005:
                panel.text(forecast, truth, f"{100 * share:.1f}", ha="center", va="center", fontsize=7)
        names = [name.replace(" polluted", "") for name in index["classes"]]
        panel.set(title=lead, xticks=range(6), yticks=range(6), xlabel="forecast")
        panel.set_xticklabels(names, rotation=60, ha="right", fontsize=7)
        panel.set_yticklabels(names if panel is panels[0, 0] else [], fontsize=7)
    panels[0, 0].set_ylabel("truth")
    figure.colorbar(image, ax=list(panels[0]), label=f"% of cells and days, {index['standard']}", shrink=0.8)
    write(figure, out)


def _happened(event: dict[str, Any]) -> bool:
    first = next(iter(event["regions"]["domain"].values()))["forecast"]
    return bool(first["base_rate"]) and first["far"] is not None


def _any_exceeded(event: dict[str, Any]) -> bool:
    return any(share for share in next(iter(event["leads"].values()))["share"])


def _panels(names: dict[str, Any]) -> tuple[Figure, list[Axes]]:
    rows = -(-len(names) // 3)
    figure, panels = plt.subplots(rows, min(3, len(names)), figsize=(12, 3.1 * rows + 0.6), squeeze=False, layout="constrained")
    for panel in panels.flat[len(names) :]:
        panel.set_visible(False)
    return figure, list(panels.flat[: len(names)])


def _finish(
    figure: Figure, panels: list[Axes], evaluation: dict[str, Any], title: str, out: Path, below: str = "lead time (h)"
) -> None:
    for panel in panels[-3:]:
        panel.set_xlabel(below)
    panels[0].legend(fontsize=7)
    figure.suptitle(f"{title}; {evaluation['split']} split, {evaluation['samples']} samples", fontsize=11)
    write(figure, out)


def _styles(leads: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Of the baselines that were scored."""
    one = next(iter(leads.values()))
    return {name: style for name, style in STYLES.items() if f"{name}_rmse" in one}


def _hours(leads: dict[str, Any]) -> list[int]:
    return [int(lead.removesuffix("h")) for lead in leads]


def _values(leads: dict[str, Any], kind: str) -> np.ndarray:
    """One score of every lead time, NaN where there was nothing to score."""
    return np.array([np.nan if of[kind] is None else of[kind] for of in leads.values()], float)
