"""docs/study.md and its figures from results.json: nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from benchmarks.physics_study.design import AIR, BLOCKING, HERE, LEADS, REGIONS, RESULTS, ROOT, TEST_SAMPLES, VARIANTS

matplotlib.use("Agg")
OUT, FIGURES = ROOT / "docs" / "study.md", ROOT / "docs" / "study"
BIASES = ("descent", "climb")
SHORT = tuple(variant for variant in VARIANTS if not variant.startswith("long"))
COLOURS = dict(zip(BLOCKING, ("0.6", "#1f77b4", "#d62728"), strict=True))


class Results:
    """Trainings by (blocking, variant, seed)."""

    def __init__(self, path: Path) -> None:
        tree = json.loads(path.read_text())
        self.oracle: dict[str, Any] = tree["oracle"]
        self.rows = {(row["blocking"], row["variant"], row["seed"]): row for row in tree["runs"]}

    def seeds(self, blocking: int, variant: str) -> list[int]:
        return sorted(seed for k, name, seed in self.rows if (k, name) == (blocking, variant))

    def differences(self, blocking: int, variant: str, than: str, region: str, leads: tuple[int, ...] = LEADS) -> list[float]:
        """Per cent by which RMSE is above another variant's of the same seed: geometric mean over pollutants and leads."""
        found = []
        for seed in self.seeds(blocking, variant):
            own, other = self.rows[blocking, variant, seed], self.rows.get((blocking, than, seed))
            if other is not None:
                logs = [np.log(own["rmse"][region][str(lead)]) - np.log(other["rmse"][region][str(lead)]) for lead in leads]
                found.append(100 * (float(np.exp(np.mean(logs))) - 1))
        return found

    def alpha(self, blocking: int, variant: str, seed: int) -> float:
        return float(self.rows[blocking, variant, seed]["alpha"][-1][1])


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval over seeds (Student's t)."""
    middle = float(np.mean(values))
    if len(values) < 2:
        return middle, -np.inf, np.inf
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return middle, middle - half, middle + half


def cell(values: list[float]) -> str:
    if len(values) < 2:
        return "-" if not values else f"{values[0]:+.2f} (one seed)"
    middle, low, high = interval(values)
    text = f"{middle:+.2f} ({low:+.2f} to {high:+.2f})"
    return f"**{text}**" if len(values) > 2 and (low > 0 or high < 0) else text


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def ceiling_table(results: Results) -> str:
    """RMSE of the simulation without barriers over that of the network, and what is left if that error were taken out of it."""
    rows = []
    for blocking in BLOCKING[1:]:
        for region in REGIONS:
            cells = []
            for lead in LEADS:
                lost = np.array(results.oracle[str(blocking)][region][str(lead)])
                network = np.mean(
                    [results.rows[blocking, "none", s]["rmse"][region][str(lead)] for s in results.seeds(blocking, "none")],
                    axis=0,
                )
                cells.append(f"{np.exp(np.mean(np.log(lost / network))):.2f}")
            rows.append([str(blocking), region, *cells])
    return table(["blocking, 1/km", "region", *(f"{lead} h" for lead in LEADS)], rows)


def difference_table(results: Results, pairs: list[tuple[str, str]], leads: tuple[int, ...] = LEADS) -> str:
    rows = []
    for variant, than in pairs:
        for blocking in BLOCKING:
            values = [results.differences(blocking, variant, than, region, leads) for region in REGIONS]
            if any(values):
                name = f"{variant} against {than}"
                rows.append([name, str(blocking), str(len(values[0])), *map(cell, values)])
    return table(["", "blocking", "seeds", *REGIONS], rows)


def air_table(results: Results) -> str:
    """Of what is made of the paths of the air: the difference by lead time, and of the pollutant that gains least."""
    rows = []
    for variant in AIR:
        for blocking in BLOCKING:
            values = [results.differences(blocking, variant, "none", "domain", (lead,)) for lead in LEADS]
            if not any(values):
                continue
            ratios = [
                np.array(results.rows[blocking, variant, seed]["rmse"]["domain"][str(lead)])
                / np.array(results.rows[blocking, "none", seed]["rmse"]["domain"][str(lead)])
                for seed in results.seeds(blocking, variant)
                for lead in LEADS
                if (blocking, "none", seed) in results.rows
            ]
            least = f"{100 * (float(np.max(ratios)) - 1):+.0f}"
            rows.append([variant, str(blocking), str(len(values[0])), *map(cell, values), least])
    return table(["", "blocking", "seeds", *(f"{lead} h" for lead in LEADS), "least of all, %"], rows)


def alpha_table(results: Results) -> str:
    rows = []
    for variant in (*BIASES, "scan and climb"):
        for blocking in BLOCKING:
            ends = [results.alpha(blocking, variant, seed) for seed in results.seeds(blocking, variant)]
            if ends:
                listed = ", ".join(f"{alpha:+.2f}" for alpha in ends)
                rows.append([variant, str(blocking), listed, cell(ends)])
    return table(["bias", "blocking", "alpha at the end, by seed", "mean and interval"], rows)


def rising(results: Results, variant: str) -> tuple[int, int]:
    """(seeds whose alpha rises with blocking, seeds with all three)."""
    shared = set.intersection(*(set(results.seeds(k, variant)) for k in BLOCKING))
    found = [[results.alpha(k, variant, seed) for k in BLOCKING] for seed in sorted(shared)]
    return sum(a < b < c for a, b, c in found), len(found)


def loss_table(results: Results) -> str:
    rows = []
    for variant in VARIANTS:
        cells = []
        for blocking in BLOCKING:
            losses = [results.rows[blocking, variant, seed]["loss"] for seed in results.seeds(blocking, variant)]
            cells.append(f"{np.mean(losses):.4f} ({len(losses)})" if losses else "-")
        rows.append([variant, *cells])
    return table(["", *(f"blocking {k}" for k in BLOCKING)], rows)


def cost_table(results: Results) -> str:
    rows = []
    for variant in SHORT:
        ratios = [
            row["seconds_a_step"] / results.rows[k, "none", seed]["seconds_a_step"]
            for (k, name, seed), row in results.rows.items()
            if name == variant and (k, "none", seed) in results.rows
        ]
        if ratios:
            rows.append([variant, f"{np.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"])
    return table(["", "a step, times that without", "range"], rows)


def draw_alphas(results: Results, path: Path) -> None:
    figure, panels = plt.subplots(1, len(BIASES), figsize=(10, 3.6), sharey=True, layout="constrained")
    for panel, variant in zip(panels, BIASES, strict=True):
        for blocking in BLOCKING:
            for number, seed in enumerate(results.seeds(blocking, variant)):
                steps, alphas = zip(*results.rows[blocking, variant, seed]["alpha"], strict=True)
                panel.plot(
                    steps, alphas, color=COLOURS[blocking], lw=1.2, label=None if number else f"blocking {blocking} / km"
                )
        panel.axhline(0, color="0.8", lw=0.8, zorder=0)
        panel.set(title=variant, xlabel="optimizer step")
    panels[0].set_ylabel("elevation_alpha, per km")
    panels[0].legend(frameon=False)
    _write(figure, path)


def draw_differences(results: Results, path: Path) -> None:
    shown = [variant for variant in SHORT if variant != "none" and results.seeds(BLOCKING[-1], variant)]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for panel, region in zip(panels, ("domain", "lee"), strict=True):
        for offset, blocking in zip((-0.22, 0.0, 0.22), BLOCKING, strict=True):
            _draw_points(panel, results, shown, region, blocking, offset)
        panel.axvline(0, color="0.6", lw=0.8)
        panel.set(
            title=region, xlabel="RMSE against the network without physics, %", yticks=range(len(shown)), yticklabels=shown
        )
    panels[0].invert_yaxis()
    panels[1].legend(frameon=False, fontsize=8)
    _write(figure, path)


def _draw_points(panel: Axes, results: Results, shown: list[str], region: str, blocking: int, offset: float) -> None:
    labelled = False
    for row, variant in enumerate(shown):
        values = results.differences(blocking, variant, "none", region)
        if not values:
            continue
        middle, low, high = interval(values)
        label = None if labelled else f"blocking {blocking} / km"
        labelled = True
        panel.plot(values, [row + offset] * len(values), ".", color=COLOURS[blocking], ms=5, alpha=0.5)
        panel.plot([middle], [row + offset], "|", color=COLOURS[blocking], ms=11, mew=2, label=label)
        if np.isfinite(high - low):
            panel.plot([low, high], [row + offset] * 2, color=COLOURS[blocking], lw=1.5)


def draw_ceiling(results: Results, path: Path) -> None:
    figure, panels = plt.subplots(1, len(LEADS), figsize=(11, 3.4), sharey=True, layout="constrained")
    width = 0.2
    for panel, lead in zip(panels, LEADS, strict=True):
        bars: list[tuple[str, str, Callable[[int, str], list[float]]]] = [
            ("persistence", "0.8", lambda k, r, h=lead: _of(results, k, r, h, "persistence_rmse")),
            ("climatology", "0.6", lambda k, r, h=lead: _of(results, k, r, h, "climatology_rmse")),
            ("network without physics", "#1f77b4", lambda k, r, h=lead: _of(results, k, r, h, "rmse")),
            ("simulation without barriers", "#d62728", lambda k, r, h=lead: results.oracle[str(k)][r][str(h)]),
        ]
        for number, (label, colour, values) in enumerate(bars):
            for place, blocking in enumerate(BLOCKING):
                truth = np.array(_of(results, blocking, "domain", lead, "climatology_rmse"))
                height = np.exp(np.mean(np.log(np.maximum(np.array(values(blocking, "domain")) / truth, 1e-3))))
                panel.bar(place + (number - 1.5) * width, height, width, color=colour, label=label if place == 0 else None)
        panel.set(title=f"{lead} h", xticks=range(3), xticklabels=[str(k) for k in BLOCKING], xlabel="blocking, 1/km")
    panels[0].set_ylabel("RMSE / that of climatology")
    panels[0].set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _write(figure, path)


def _of(results: Results, blocking: int, region: str, lead: int, what: str) -> list[float]:
    seeds = results.seeds(blocking, "none")
    rows = [results.rows[blocking, "none", seed][what][region][str(lead)] for seed in seeds]
    return list(np.mean(rows, axis=0))


def _write(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=85, metadata={"Software": None})
    plt.close(figure)


def draw() -> None:
    """Write the page; its words are in page.md, its numbers and figures from the results."""
    results = Results(RESULTS)
    draw_ceiling(results, FIGURES / "ceiling.png")
    draw_alphas(results, FIGURES / "alpha.png")
    draw_differences(results, FIGURES / "differences.png")
    against_none = [(variant, "none") for variant in SHORT if variant != "none"]
    numbers = {
        "trainings": str(len(results.rows)),
        "ceiling": ceiling_table(results),
        "air": air_table(results),
        "alpha": alpha_table(results),
        "rising": "; ".join("{}: {} of {}".format(name, *rising(results, name)) for name in BIASES),
        "differences": difference_table(results, [*against_none, ("climb", "descent"), ("advection", "locality")]),
        "long": difference_table(
            results, [(variant, "long none") for variant in VARIANTS if variant not in (*SHORT, "long none")]
        ),
        **{f"{lead} h": difference_table(results, against_none, (lead,)) for lead in LEADS},
        "samples": f"{TEST_SAMPLES:,}",
        "loss": loss_table(results),
        "cost": cost_table(results),
    }
    page = (HERE / "page.md").read_text()
    for name, text in numbers.items():
        page = page.replace(f"<!-- {name} -->", text.rstrip())
    OUT.write_text(page)
    print(f"wrote {OUT} from {len(results.rows)} trainings")
