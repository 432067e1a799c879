"""Write a small physical reanalysis over real East Asian terrain as an ordinary store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import xarray as xr
from rich.console import Console
from rich.progress import track

from data import DataError
from data.store import finishing, writing
from data.synthetic.atmosphere import Atmosphere
from data.synthetic.recipe import Recipe

STATIC_FILE = Path(__file__).with_name("east_asia_static_128x256.nc")


def synthesize(path: Path, recipe: Recipe) -> str:
    """Simulate, write the store at `path` and return its fingerprint.

    Raises:
        DataError: the grid does not divide 128 x 256, or a split is empty.
    """
    lat, lon, static = load_static(recipe.rows, recipe.cols)
    hours = recipe.days * 24
    train = int(hours * recipe.train)
    validation = train + int(hours * recipe.validation)
    if not 0 < train < validation < hours:
        raise DataError(f"splits of {hours} hours at {train} and {validation} leave one empty: change --train.")
    try:
        times = np.datetime64(recipe.start, "h") + np.arange(hours)
    except ValueError as error:
        raise DataError(f"'{recipe.start}' is not a day: write it as 2015-01-01.") from error
    writing.create(
        path,
        times=times,
        lat=lat,
        lon=lon,
        static=static,
        shard_hours=recipe.shard_hours,
        splits={"train": (0, train), "validation": (train, validation), "test": (validation, hours)},
        provenance={
            "generator": "python -m data synthesize",
            "recipe": asdict(recipe),
            "static_fields": "ETOPO5 elevation and land (NOAA, public domain); GeoNames cities (CC BY 4.0)",
        },
    )
    atmosphere = Atmosphere(lat, lon, static, recipe)
    weather = np.empty((recipe.shard_hours, 5, recipe.rows, recipe.cols), "f4")
    chemistry = np.empty((recipe.shard_hours, 6, recipe.rows, recipe.cols), "f4")
    hide = np.random.default_rng([recipe.seed, 1])
    for hour in track(range(hours), "simulating", console=Console(stderr=True)):
        slot = hour % recipe.shard_hours
        weather[slot], chemistry[slot] = atmosphere.advance_one_hour(times[hour])
        _hide_rectangles(chemistry[slot], recipe.missing, hide)
        if slot == recipe.shard_hours - 1 or hour == hours - 1:
            writing.write_block(path, "weather", hour - slot, weather[: slot + 1])
            writing.write_block(path, "chemistry", hour - slot, chemistry[: slot + 1])
    return finishing.finalise(path)


def load_static(rows: int, cols: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Block-average the packaged terrain to (rows, cols), northern row first.

    Raises:
        DataError: rows x cols does not divide 128 x 256.
    """
    with xr.open_dataset(STATIC_FILE) as file:
        file = file.sortby("lat", ascending=False).load()
    full_rows, full_cols = file.sizes["lat"], file.sizes["lon"]
    if rows < 4 or cols < 4 or full_rows % rows or full_cols % cols:
        raise DataError(f"a grid of {rows} x {cols} does not divide {full_rows} x {full_cols}: use 64 128, 32 64, ...")
    coarse = file.coarsen(lat=full_rows // rows, lon=full_cols // cols).mean()
    lat, lon = coarse["lat"].to_numpy(), coarse["lon"].to_numpy()
    interior = np.zeros((rows, cols), "f4")
    margin = max(1, rows // 16)
    interior[margin:-margin, margin:-margin] = 1.0  # the inflow boundary cannot be forecast from inside
    return (
        lat,
        lon,
        {
            "lat2d": np.repeat(lat[:, None], cols, 1).astype("f4"),
            "lon2d": np.repeat(lon[None], rows, 0).astype("f4"),
            "elevation": coarse["elevation"].to_numpy().astype("f4"),
            "population": coarse["population_density"].to_numpy().astype("f4"),
            "land_fraction": coarse["land_fraction"].to_numpy().astype("f4"),
            "domain_mask": interior,
        },
    )


def _hide_rectangles(fields: np.ndarray, share: float, rng: np.random.Generator) -> None:
    """Set about `share` of the cells of (6, H, W) `fields` to NaN, a rectangle of one variable at a time."""
    _, rows, cols = fields.shape
    height, width = max(1, rows // 8), max(1, cols // 8)
    for channel in range(len(fields)):
        if rng.random() < share * rows * cols / (height * width):
            top, left = rng.integers(rows - height + 1), rng.integers(cols - width + 1)
            fields[channel, top : top + height, left : left + width] = np.nan
