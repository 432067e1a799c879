"""Pictures of a new store: where people look before they train on it."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from data.store.layout import Store
from data.store.reader import ShardReader

matplotlib.use("Agg")
SAMPLED_HOURS = 48
FIXED = ("elevation", "population", "land_fraction", "domain_mask")


def draw(store: Store) -> Path:
    """Maps of every variable, averaged over hours spread evenly over the store, and missing shares through time.

    Returns:
        The PNG, beside the store.
    """
    held = store.contents
    names = [(group, channel, v) for group in held.dynamic for channel, v in enumerate(held.groups[group])]
    rows = -(-(len(names) + len(FIXED) + 1) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(18, 3.25 * rows), layout="constrained")

    def panel(axis: plt.Axes, values: np.ndarray, title: str) -> None:
        finite = values[np.isfinite(values)]
        low, high = np.percentile(finite, [1, 99]) if finite.size else (0.0, 1.0)
        image = axis.pcolormesh(store.lon, store.lat, values, vmin=low, vmax=high, cmap="viridis")
        axis.set_title(title, fontsize=10)
        figure.colorbar(image, ax=axis, shrink=0.8)

    means = {group: _mean(store, group) for group in held.dynamic}
    for axis, (group, channel, variable) in zip(axes.flat, names, strict=False):
        panel(axis, means[group][channel], f"{variable.name} ({variable.units}), {SAMPLED_HOURS} hours")
    for axis, name in zip(axes.flat[len(names) :], FIXED, strict=False):
        panel(axis, store.static[name], f"{name} ({held.variable(name).units})")
    axis = axes.flat[-1]
    for group in held.dynamic:
        axis.plot(store.times, 100 * store.missing[group].mean(1), label=group, linewidth=0.8)
    axis.set_title("missing cells (%)", fontsize=10)
    axis.tick_params(axis="x", rotation=30)
    axis.legend()
    path = store.path.with_suffix(".png")
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def _mean(store: Store, group: str) -> np.ndarray:
    """(V, H, W) over hours that are not wholly missing, spread evenly; NaN where a cell has none."""
    present = np.flatnonzero((store.missing[group] < 1.0).any(1))
    hours = present[np.linspace(0, len(present) - 1, min(SAMPLED_HOURS, len(present))).round().astype(int)]
    fields = ShardReader(store, group).read(hours)
    counted = np.isfinite(fields)
    total = np.where(counted, fields, 0.0).sum(0)
    return np.divide(total, counted.sum(0), out=np.full(total.shape, np.nan), where=counted.any(0))
