"""Pictures of a run: loss curves, and truth / forecast / difference maps of a case."""

from __future__ import annotations

import json
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from PIL import Image

from data import DataError
from data.store.layout import Store
from trainer.forecaster import Forecaster, forecast

matplotlib.use("Agg")
LABELS = {"pm25": "PM$_{2.5}$", "pm10": "PM$_{10}$", "so2": "SO$_2$", "no2": "NO$_2$", "co": "CO", "o3": "O$_3$"}
DPI = 85
SKEWED = ("pm25", "pm10", "so2", "no2", "co")


def plot_curves(run_dir: Path, out: Path) -> None:
    """Training loss (total and of each pollutant), validation loss, learning rate and alpha against steps.

    Raises:
        DataError: the run has written no metrics yet.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"no metrics at {path}: the run has not logged a step yet.")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    train = [r for r in rows if r["kind"] == "train"]
    validation = [r for r in rows if r["kind"] == "validation"]
    has_alpha = any("elevation_alpha" in r for r in train)
    figure, panels = plt.subplots(1, 3 if has_alpha else 2, figsize=(15 if has_alpha else 10, 4), layout="constrained")
    steps = [r["step"] for r in train]
    for key in dict.fromkeys(key for row in train for key in row if key.startswith("loss_")):
        name = key.removeprefix("loss_")
        panels[0].plot(steps, [r.get(key, np.nan) for r in train], lw=0.9, alpha=0.7, label=LABELS.get(name, name))
    panels[0].plot(steps, [r["loss"] for r in train], "k", lw=1.8, label="training")
    panels[0].plot([r["step"] for r in validation], [r["loss"] for r in validation], "ko--", mfc="w", label="validation")
    panels[0].set(xlabel="optimizer step", ylabel="squared error, normalised", yscale="log", title="loss")
    panels[0].legend(ncols=2, fontsize=8)
    panels[1].plot(steps, [r["lr"] for r in train], "k")
    panels[1].set(xlabel="optimizer step", title="learning rate")
    if has_alpha:
        panels[2].plot(steps, [r.get("elevation_alpha", np.nan) for r in train], "k")
        panels[2].axhline(0, color="0.7", lw=0.8)
        panels[2].set(xlabel="optimizer step", title="elevation_alpha (bias per km)")
    write(figure, out)


def plot_case(forecaster: Forecaster, hour: int, lead: int, out: Path) -> None:
    """Analysis, truth, forecast and forecast - truth for every pollutant."""
    batch, fields = forecast(forecaster, hour, [lead])
    store, targets = forecaster.dataset.store, forecaster.dataset.normalizer.targets
    before = forecaster.dataset.normalizer.persistence(batch)[0].cpu().numpy()
    truth = forecaster.dataset.normalizer.truth(batch)[0].cpu().numpy()
    predicted = fields[0].cpu().numpy()
    height = 3.75 * aspect_of(store) * np.ptp(store.lat) / np.ptp(store.lon)
    figure, panels = plt.subplots(
        len(targets),
        4,
        figsize=(16, max(2.0, height) * len(targets)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    valid = store.times[hour] + lead
    titles = (f"analysis {store.times[hour]}", f"truth {valid}", f"forecast, {lead} h", "forecast - truth")
    for column, title in enumerate(titles):
        panels[0, column].set_title(title, fontsize=11)
    for row, name in enumerate(targets):
        low, high = spread(np.stack([before[row], truth[row], predicted[row]]), 0.02, 0.995)
        held = forecaster.dataset.store.contents
        least = max(low, 1e-3 * high) if name in SKEWED else low
        norm = LogNorm(least, high) if name in SKEWED else Normalize(least, high)
        for column, field in enumerate((before[row], truth[row], predicted[row])):
            shown = np.maximum(field, least)  # a forecast of 0 has no logarithm, and is not missing
            image = draw_map(panels[row, column], store, shown, norm=norm, cmap="viridis")
        figure.colorbar(
            image, ax=list(panels[row, :3]), shrink=0.85, label=f"{LABELS.get(name, name)} ({held.variable(name).units})"
        )
        difference = predicted[row] - truth[row]
        span = spread(np.abs(difference), 0.0, 0.99)[1]
        image = draw_map(panels[row, 3], store, difference, norm=Normalize(-span, span), cmap="RdBu_r")
        figure.colorbar(image, ax=panels[row, 3], shrink=0.85, label=held.variable(name).units)
    write(figure, out)


def spread(fields: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Two quantiles of the known values, apart from one another; 0 and 1 where nothing is known."""
    known = fields[np.isfinite(fields)]
    least, most = np.quantile(known, [low, high]) if known.size else (0.0, 1.0)
    return float(least), float(max(most, least + 1e-6 * (1.0 + abs(least))))


def draw_map(panel: Axes, store: Store, field: np.ndarray, norm: Normalize, cmap: str) -> Any:
    """One field over coastlines and the contours of 1,500 and 3,500 m; missing cells grey."""
    image = panel.pcolormesh(store.lon, store.lat, field, norm=norm, cmap=cmap, shading="nearest", rasterized=True)
    panel.contour(store.lon, store.lat, store.static["land_fraction"], [0.5], colors="k", linewidths=0.7)
    panel.contour(store.lon, store.lat, store.static["elevation"], [1500, 3500], colors="0.35", linewidths=0.4)
    panel.set_facecolor("0.85")  # missing
    panel.set_aspect(aspect_of(store))
    return image


def aspect_of(store: Store) -> float:
    """Height of a degree on the ground over its width, at the middle latitude."""
    return float(1.0 / np.cos(np.deg2rad(store.lat.mean())))


def write(figure: Figure, out: Path) -> None:
    """As PNG of 256 colours, a third of the size: many pictures make one page."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=DPI)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(palette=_palette(), dither=Image.Dither.NONE).save(out, optimize=True)


@lru_cache(maxsize=1)
def _palette() -> Image.Image:
    """The colours that are drawn: those of the colour maps, of lines, and greys."""
    counts = {"viridis": 96, "RdBu_r": 96, "tab20": 20, "tab10": 10, "gray": 34}
    colours = [matplotlib.colormaps[name](np.linspace(0.0, 1.0, count))[:, :3] for name, count in counts.items()]
    palette = Image.new("P", (1, 1))
    palette.putpalette((255.0 * np.concatenate(colours)).round().astype("u1").tobytes())
    return palette
