"""A trained network for a person's own script: forecasts of an xarray dataset, without store, DeepSpeed or launcher."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from data import DataError
from data.batch import Batch, Normalizer
from data.channels import climatology, surroundings
from data.channels.channels import EVERY_H
from data.channels.climatology import Climatology
from data.channels.transport import Transport
from data.given.analyses import Analyses
from data.process.ranks import world
from data.store.layout import Store
from data.wind_paths.cache import GONE, geometry_of, records_of
from data.wind_paths.trajectories import PathGrid
from data.wind_scan.cache import without_wind
from data.wind_scan.orders import beyond_the_domain, sector_codes
from trainer.checkpoint.manifest import CheckpointError, sha256_of
from trainer.config import Run
from trainer.config_file import validate
from trainer.dataset import Dataset
from trainer.forecaster import finite
from trainer.model.topoflow import TopoFlow, patch_mean
from trainer.process.launch import device_of
from trainer.weights.fit import network_of
from trainer.weights.reading import read


def load_forecaster(path: str | Path) -> StandaloneForecaster:
    """A trained network from a run (its newest checkpoint), one checkpoint, or an export.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        DataError: what was kept of the store beside it is absent, damaged, or of other data.
    """
    path = Path(path)
    weights = read(path)
    record = weights.record
    if record is None or path.suffix == ".ckpt":
        remedy = "use `python -m trainer checkpoint export`"
        raise CheckpointError(f"{path} is neither a run nor an export of ours: {remedy}.")
    if "data" not in record.fingerprints:
        raise CheckpointError(f"nothing is recorded of the data behind {path}: start a run from it (init_from), and take that.")
    run = validate(record.config, str(path))
    device = device_of(world())
    network = network_of(weights, run)[0].to(device).eval()
    names = (surroundings.FILE, climatology.FILE)
    exported = weights.loaded is None
    run_dir = path if weights.loaded is None else weights.loaded.path.resolve().parent.parent
    kept = [path.with_suffix(f".{name}") if exported else run_dir / name for name in names]
    for file, name in zip(kept, names, strict=True):
        if exported and (sha256_of(file) if file.exists() else None) != record.files.get(name):
            remedy = "copy it again from beside the export"
            raise DataError(f"{file} is not what was exported with {path.name}: {remedy}.")
    source = f"{weights.source}, step {record.step}, weights {weights.taken}"
    known = record.fingerprints["data"], record.statistics
    return StandaloneForecaster(run, network, kept[0], kept[1], *known, device, source)


@dataclass
class StandaloneForecaster:
    """Forecasts of analyses that a person has in memory."""

    run: Run
    network: TopoFlow
    surroundings: Path
    climatology: Path
    data: str  # fingerprint of what it was trained on
    statistics: dict[str, dict[str, float]]  # by which its inputs were normalised
    device: torch.device
    source: str

    def predict(self, analyses: xr.Dataset, lead_hours: list[int] | None = None) -> xr.Dataset:
        """Forecast from every hour of `analyses` from which it is possible.

        Args:
            analyses: every input that changes with time, as (time, lat, lon) on the run's grid, with `units` that are
                turned into ours; hourly times. Where the run has `data.history` or `data.future`, the hours before or after
                must be there; where it follows the air, the winds of every hour to the valid time. Missing cells are
                filled as in training.
            lead_hours: those that it was trained for, by default all.

        Returns:
            (time, prediction_timedelta, lat, lon) of every target, ug m-3, CF.

        Raises:
            DataError: a variable, unit, grid, time or wind is missing or wrong.
        """
        leads = lead_hours or self.run.data.lead_hours
        unknown = [lead for lead in leads if lead not in self.run.data.lead_hours]
        if unknown:
            raise DataError(f"the run was trained for {self.run.data.lead_hours} h, not for {unknown} h.")
        kept, scan = surroundings.restore(self.surroundings)
        if not kept.continues(self.data) or kept.statistics != self.statistics:
            raise DataError(f"{self.surroundings} is of other data than the network: bring back its own.")
        hours = Analyses(analyses, kept)
        at = replace(kept, times=hours.axis)
        air = geometry_of(kept, self.run.model.patch, max(self.run.data.lead_hours)) if self.run.uses_paths else None
        transport = None if air is None else Transport(at, air, self.device)
        normalizer = Normalizer(at, self.run.data.channels(), self.run.data.targets, self.device, transport)
        elevation = patch_mean(torch.from_numpy(kept.static["elevation"])[None], self.run.model.patch)[0].to(self.device)
        usual = self._usual(at) if self.run.model.predict == "change" else None
        dataset = Dataset(self.run, at, scan, normalizer, elevation, self.device, usual)
        starts = hours.starts(normalizer.reads, leads, every_hour=self.run.uses_paths)
        forecasts = np.stack([self._from(dataset, hours, start, leads) for start in starts])
        return self._described(forecasts, hours.axis[starts], leads, at)

    @torch.no_grad()
    def _from(self, dataset: Dataset, hours: Analyses, start: int, leads: list[int]) -> np.ndarray:
        """(L, T, H, W) ug m-3 from one analysis."""
        t, lead = np.full(len(leads), start), np.array(leads)
        fields = {
            read.key: hours.group(read, t + lead if read.back is None else t - read.back, dataset.run.data.channels().stored)
            for read in dataset.normalizer.reads
        }
        shape = (len(leads), len(dataset.store.contents.names("chemistry")), *dataset.store.grid)
        numbers = torch.from_numpy(lead).float()
        ranks = torch.from_numpy(self._ranks(dataset, hours, start)).expand(len(leads), -1)
        counted, truth = torch.ones(len(leads)).bool(), torch.full(shape, torch.nan)
        paths = self._paths(dataset, hours, start, leads) if self.run.uses_paths else None
        batch = Batch(fields, truth, numbers, ranks, t, t + lead, 0, counted, paths)
        _, _, arguments = dataset.prepare(batch)
        normalised = self.network(*arguments).float()
        forecast = finite(normalised, f"the forecast from {hours.axis[start]}")
        return dataset.normalizer.physical(forecast).cpu().numpy()

    def _paths(self, dataset: Dataset, hours: Analyses, start: int, leads: list[int]) -> torch.Tensor:
        """(L, points, 2, P) int8 ways of the air along the winds that are given, from the analysis to each valid time."""
        transport = dataset.normalizer.transport
        assert transport is not None
        grid, longest = PathGrid.of(dataset.store), max(leads)
        winds = np.stack([[hours.field(name, start + hour) for name in ("u", "v")] for hour in range(longest + 1)])
        found = [records_of(winds[: lead + 1], transport.geometry, grid) for lead in leads]
        padded = [np.pad(each, ((0, longest // EVERY_H - len(each)), (0, 0), (0, 0)), constant_values=GONE) for each in found]
        return torch.from_numpy(np.stack(padded))

    def _ranks(self, dataset: Dataset, hours: Analyses, start: int) -> np.ndarray:
        mode, scan = self.run.wind_scan.mode, dataset.scan
        if scan is None or mode == "none":
            return np.arange(len(dataset.elevation))[None]
        u, v = (hours.field(name, start)[None] for name in ("u", "v"))
        geometry = scan.geometry
        codes = sector_codes(u, v, geometry.regions, geometry.sectors)
        codes = beyond_the_domain(codes, dataset.store.static["domain_mask"], geometry.regions)
        if without_wind(mode, codes).any():
            raise DataError(f"the wind of {hours.axis[start]} is missing in a whole region: the order of the scan is unknown.")
        return scan.ranks_along(mode, codes)

    def _usual(self, at: Store) -> Climatology:
        means, months, _ = climatology.read(self.climatology)
        return Climatology(at, self.run.data.targets, means, months, self.device)

    def _described(self, forecasts: np.ndarray, times: np.ndarray, leads: list[int], at: Store) -> xr.Dataset:
        coordinates: dict[str, Any] = {
            "time": ("time", times.astype("datetime64[ns]"), {"standard_name": "forecast_reference_time"}),
            "prediction_timedelta": (
                "prediction_timedelta",
                np.array(leads, "timedelta64[h]").astype("timedelta64[ns]"),
                {"standard_name": "forecast_period"},
            ),
            "lat": ("lat", at.lat, {"standard_name": "latitude", "units": "degrees_north"}),
            "lon": ("lon", at.lon, {"standard_name": "longitude", "units": "degrees_east"}),
        }
        variables = {}
        for channel, name in enumerate(self.run.data.targets):
            variable = at.contents.variable(name)
            about = {"units": variable.units, "standard_name": variable.standard_name, "long_name": variable.long_name}
            variables[name] = (tuple(coordinates), forecasts[:, :, channel], about)
        return xr.Dataset(variables, coordinates, {"Conventions": "CF-1.11", "source": self.source})
