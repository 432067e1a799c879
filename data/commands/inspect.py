"""Print what a store holds: grid, time, splits, statistics, missing shares, provenance, fingerprint, ozone's day."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from data.store.layout import Store

DAYS = 10  # read for ozone's day, evenly from the training split
AFTERNOON = (10.0, 20.0)  # local solar hours around ozone's peak, which the sun brings about
LEAST_SWING = 0.1  # of the mean, from which on the hour of the peak means something
EXAMPLES = "  python -m data inspect datasets/demo.zarr"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path)


def run(options: argparse.Namespace) -> None:
    from data.command_line import console
    from data.store.opening import open_store

    store, screen = open_store(options.store), console()
    show_properties(store, screen)
    show_statistics(store, screen)
    show_years(store, screen)
    show_ozone(store)


def show_properties(store: Store, screen: Console) -> None:
    from rich.table import Column, Table

    (rows, cols), lat, lon, times = store.grid, store.lat, store.lon, store.times
    files = [f for f in store.path.rglob("*") if f.is_file()]
    size = sum(f.stat().st_size for f in files)
    table = Table("property", Column("value", overflow="fold"), title=str(store.path))
    latitudes, longitudes = (f"{c[0]:.3f} .. {c[-1]:.3f}" for c in (lat, lon))
    table.add_row("grid", f"{rows} x {cols}, latitude {latitudes}, longitude {longitudes}")
    table.add_row("time", f"{times[0]} .. {times[-1]}, {len(times)} hours")
    for name, ranges in store.splits.items():
        for first, last in ranges:
            table.add_row(f"split {name}", f"{times[first]} .. {times[last - 1]}, {last - first} hours")
    table.add_row("size", f"{size / 1e6:.1f} MB in {len(files)} files, {store.shard_hours} hours a shard")
    for key, value in store.provenance.items():
        table.add_row(key, str(value))
    table.add_row("fingerprint", store.fingerprint)
    screen.print(table)


def show_statistics(store: Store, screen: Console) -> None:
    from rich.table import Table

    missing: dict[str, float] = {}
    for group, shares in store.missing.items():
        missing |= dict(zip(store.contents.names(group), shares.mean(0).tolist(), strict=True))
    columns = ("mean", "std", "min", "max")
    table = Table("variable", "units", *columns, "missing %", title="statistics of the training split")
    for name, numbers in store.statistics.items():
        values = [f"{numbers[key]:.5g}" for key in columns]
        table.add_row(name, store.contents.variable(name).units, *values, f"{100 * missing.get(name, 0.0):.3f}")
    screen.print(table)


def show_years(store: Store, screen: Console) -> None:
    from rich.table import Table

    table = Table("year", "hours", "gaps", "variable", "missing %", "least", "greatest", title="summary of years")
    for year, about in store.years.items():
        for name, entry in about["variables"].items():
            ends = ["-", "-"] if entry["range"] is None else [f"{x:.5g}" for x in entry["range"]]
            gaps = about["gaps"][store.contents.group(name)]
            table.add_row(year, str(about["hours"]), str(gaps), name, f"{100 * entry['missing']:.3f}", *ends)
    screen.print(table)


def show_ozone(store: Store) -> None:
    """The mean diurnal cycle of ozone, and on stderr a warning if its hour says that the times are in another zone."""
    if "o3" not in store.contents.names("chemistry"):
        return
    import numpy as np

    mean = ozone_by_local_hour(store)
    there = np.flatnonzero(np.isfinite(mean))
    if len(there) < 6:
        return
    angle = 2 * np.pi * (there + 0.5) / 24
    base, cosine, sine = np.linalg.lstsq(np.stack([np.ones(len(there)), np.cos(angle), np.sin(angle)], 1), mean[there])[0]
    peak = float(np.arctan2(sine, cosine)) * 24 / (2 * np.pi) % 24
    hours = ", ".join(f"{hour} h {mean[hour]:.0f}" for hour in there[there % 3 == 0])
    print(f"o3 by local solar hour, ug m-3: {hours}; peak of its daily wave at {peak:.1f} h")
    if np.hypot(cosine, sine) > LEAST_SWING * base and not AFTERNOON[0] <= peak <= AFTERNOON[1]:
        print(
            f"warning: ozone peaks at {peak:.1f} h local solar time, where sunlight makes it peak in the early afternoon: the "
            "times of the files were probably in another time zone. Prepare them again with `--zone HOURS`.",
            file=sys.stderr,
        )


def ozone_by_local_hour(store: Store) -> np.ndarray:
    """(24,) ug m-3, means over the domain on some days of the training split; NaN for hours without a value."""
    import numpy as np

    from data.store.reader import ShardReader

    ((first, last),) = store.splits["train"]
    days = np.unique(np.linspace(0, max(0, (last - first) // 24 - 1), DAYS).astype(int))
    hours = np.minimum(first + 24 * days[:, None] + np.arange(24), last - 1).ravel()
    reader, channel = ShardReader(store, "chemistry"), store.contents.channel("o3")
    inside = store.static["domain_mask"] > 0
    total, count = np.zeros(24), np.zeros(24)
    for hour in np.unique(hours):
        field = reader.read(np.array([hour]))[0, channel]
        row, column = np.nonzero(inside & np.isfinite(field))
        utc = store.times[hour].astype("datetime64[h]").astype(int) % 24
        local = ((utc + store.lon[column] / 15) % 24).astype(int) % 24
        total += np.bincount(local, field[row, column], 24)
        count += np.bincount(local, minlength=24)
    return np.divide(total, count, out=np.full(24, np.nan), where=count > 0)
