"""The evaluation of a trained network on held-out days: one pass, shared by all ranks, in physical units."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from data import DataError
from data.batch import Batch
from data.channels.climatology import Climatology
from data.given import stations
from data.given.forecasts import Against
from data.given.regions import regions_of
from data.process.ranks import world
from data.samples import SampleIndex
from trainer.baselines.blend import SAMPLES, best_weights
from trainer.dataset import Dataset, open_climatology
from trainer.forecaster import Forecaster, given_weather
from trainer.scores.comparison import identity_of
from trainer.verification import pieces
from trainer.verification.standards import FILE
from trainer.verification.summary import maps, summary
from trainer.verification.tally import Setting, tally
from trainer.verification.weather import forecast_weather, has_weather

VERSION = 2  # of the sums


@dataclass(frozen=True)
class Options:
    """What may be chosen of an evaluation."""

    split: str = "test"
    samples: int | None = None  # spread evenly over the split; all of it by default
    utc_offset: int = 8
    regions: Path | None = None
    against: Path | None = None  # forecasts of someone else
    stations: tuple[Path, ...] = ()  # tables of observations, or directories of them
    station_list: Path | None = None
    future_from: Path | None = None  # a store of forecast weather, for runs with data.future
    out: Path | None = None  # where it is written, by default the run directory


@dataclass(frozen=True)
class Evaluation:
    scores: dict[str, Any]  # JSON values
    maps: dict[str, np.ndarray]  # (T, L, H, W) each
    parts: Path  # the pieces, of no use once the others are written


def evaluate(forecaster: Forecaster, options: Options) -> Evaluation | None:
    """Score this rank's share; on rank 0, once all ranks are done, the whole.

    Returns:
        None on ranks other than 0.

    Raises:
        DataError: there is no such split, a file that was given cannot be used, or another rank does not come.
    """
    dataset = forecaster.dataset
    if options.future_from is not None:
        dataset.forecast_weather = forecast_weather(forecaster, options.future_from)
    index = dataset.index(options.split)
    setting, numbers, day = setting_of(forecaster, index, options)
    parts = pieces.cut(day)
    stream, micro = dataset.stream(index), forecaster.run.batch.micro

    def work(number: int) -> pieces.Sums:
        part = parts[number]
        places = np.arange(part.start, part.stop)
        return tally(forecaster.model, stream.listed(numbers[part], micro), places, setting)

    rank, size = world().rank, world().size
    folder = (options.out or forecaster.run.run_dir) / f"evaluation-{options.split}.parts"
    folder = folder / _identity(forecaster, options, numbers, parts)
    done = pieces.share(folder, len(parts), work)
    mine = len(range(rank, len(parts), size))
    for _ in track(done, "evaluating", total=mine, console=Console(stderr=True), disable=rank != 0):
        pass
    if rank != 0:
        return None
    sums = pieces.merged(folder, len(parts))
    times = dataset.store.times
    about = {
        "checkpoint": str(forecaster.checkpoint),
        "step": forecaster.manifest.step,
        "weights": forecaster.which,
        **identity_of(dataset),
        "split": options.split,
        "samples": len(numbers),
        "period": [str(times[index.t.min()]), str(times[index.t.max()])],
        "weather": given_weather(forecaster),
        "utc_offset": options.utc_offset,
    }
    against = setting.baselines.get("against")
    if isinstance(against, Against):
        matched = sum(
            against.place(t, t + lead) is not None for t, lead in zip(index.t[numbers], index.lead[numbers], strict=True)
        )
        compared = f"{matched} of {len(numbers)} forecasts, {100 * against.covered():.0f} % of the domain's cells"
        about["against"] = f"{against.described()}; compared: {compared}"
    return Evaluation(about | summary(setting, sums, index.t[numbers], index.lead[numbers]), maps(setting, sums), folder)


def setting_of(forecaster: Forecaster, index: SampleIndex, options: Options) -> tuple[Setting, np.ndarray, np.ndarray]:
    """What is alike for all samples; their numbers, by local day and hour of the valid time, so that a truth is read once; and
    the day of each."""
    dataset = forecaster.dataset
    numbers = np.arange(len(index)) if options.samples is None else index.evenly(options.samples)
    if dataset.forecast_weather is not None:
        numbers = numbers[has_weather(dataset, dataset.forecast_weather, index.t[numbers] + index.lead[numbers])]
    usual = dataset.usual or open_climatology(dataset)
    regions = regions_of(dataset.store, options.regions)
    compared = baselines(dataset, usual)
    if options.against is not None:
        compared["against"] = _against(forecaster, options.against, index, numbers)
    setting = Setting(dataset, compared, regions, options.utc_offset, 0, 1, len(numbers))
    valid = index.t[numbers] + index.lead[numbers]
    day, hour = setting.local(valid)
    setting.first_day, setting.days = int(day.min()), int(day.max() - day.min()) + 1
    if options.stations:
        setting.stations = stations.read(list(options.stations), options.station_list, dataset.store, setting.targets, valid)
    order = np.lexsort((index.t[numbers], hour, day))
    return setting, numbers[order], day[order] - setting.first_day


def baselines(dataset: Dataset, usual: Climatology) -> dict[str, Callable[[Batch], Tensor]]:
    """What a forecast must beat: nothing changes; as usual; and the best mix of both on the training split."""
    normalizer, leads = dataset.normalizer, dataset.run.data.lead_hours
    trained_on = replace(dataset, forecast_weather=None)
    shares = best_weights(trained_on, usual, SAMPLES).to(dataset.device)  # (T, L)
    rows = {lead: row for row, lead in enumerate(leads)}

    def mix(batch: Batch) -> Tensor:
        anomaly, then = normalizer.departure(batch, usual.at(batch.hours), usual.at(batch.valid_hours)).unbind(1)
        of_lead = torch.stack([shares[:, rows[int(lead)]] for lead in batch.lead_hours])
        mixed = normalizer.physical(then + of_lead[:, :, None, None] * anomaly)
        return torch.where(torch.isfinite(normalizer.persistence(batch)), mixed, torch.nan)

    return {
        "persistence": normalizer.persistence,
        "climatology": lambda batch: usual.at(batch.valid_hours),
        "mix": mix,
    }


def _against(forecaster: Forecaster, path: Path, index: SampleIndex, numbers: np.ndarray) -> Against:
    """
    Raises:
        DataError: it has none of the forecasts that are evaluated.
    """
    dataset = forecaster.dataset
    against = Against(path, dataset.store, dataset.normalizer.targets, dataset.device)
    pairs = zip(index.t[numbers], index.t[numbers] + index.lead[numbers], strict=True)
    if not any(against.place(*pair) for pair in pairs):
        times = dataset.store.times[[index.t[numbers].min(), index.t[numbers].max()]]
        raise DataError(
            f"--against {against.described()} has none of the forecasts from {times[0]} to {times[1]} of "
            f"{forecaster.run.data.lead_hours} h that are evaluated."
        )
    return against


def _identity(forecaster: Forecaster, options: Options, numbers: np.ndarray, parts: list[slice]) -> str:
    given = (options.regions, options.against, *options.stations, options.station_list)
    files = {str(path): [path, *path.rglob("*")] for path in given if path is not None}
    newest = {path: max(file.stat().st_mtime_ns for file in each) for path, each in files.items()}
    return pieces.identity(
        {
            "version": VERSION,
            "standards": hashlib.sha256(FILE.read_bytes()).hexdigest(),
            "run": forecaster.run.model_dump(mode="json"),
            "weights": {name: record.sha256 for name, record in forecaster.manifest.files.items()},
            "which": forecaster.which,
            "fingerprints": forecaster.dataset.fingerprints(),
            "leads": forecaster.run.data.lead_hours,
            "micro": forecaster.run.batch.micro,
            "numbers": hashlib.sha256(numbers.tobytes()).hexdigest(),
            "parts": [[part.start, part.stop] for part in parts],
            "utc_offset": options.utc_offset,
            "given": newest,
            "weather": given_weather(forecaster),
        }
    )
