"""A trained network ready to forecast, from a run directory; what evaluation, forecasts and plots start from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import DataError
from data.batch import Batch
from data.channels import surroundings
from data.process.ranks import world
from data.samples import SampleIndex
from trainer.checkpoint.manifest import CheckpointError, Manifest
from trainer.config import Run
from trainer.config_file import validate
from trainer.dataset import Dataset, open_dataset
from trainer.model.topoflow import TopoFlow
from trainer.process.launch import device_of
from trainer.weights.fit import network_of
from trainer.weights.reading import read


@dataclass
class Forecaster:
    run: Run
    dataset: Dataset
    model: TopoFlow
    checkpoint: Path
    manifest: Manifest
    which: str  # of the weights: as trained, or their running mean


def load_forecaster(
    run_dir: Path, checkpoint: Path | None = None, overrides: list[str] | None = None, raw: bool = False
) -> Forecaster:
    """Rebuild the network of a checkpoint (by default the newest) with the data of its training.

    Args:
        overrides: `key=value`, as data.store=PATH for a store that has moved.
        raw: the weights themselves, also where the run keeps a running mean of them (`ema`).

    Raises:
        CheckpointError: none there, damaged, or the store or wind-scan cache is no longer the one it was trained on.
        DataError: the store or the cache cannot be opened.
    """
    weights = read(checkpoint or run_dir, raw)
    if weights.loaded is None:
        remedy = "name a run, or one of its checkpoints"
        raise CheckpointError(f"{checkpoint or run_dir} is no checkpoint of a run: {remedy}.")
    found, manifest = weights.loaded.path, weights.loaded.manifest
    run = validate(manifest.config, str(found / "manifest.json"), overrides)
    run = run.model_copy(update={"run_dir": run_dir.absolute()})  # it may have moved since
    dataset = open_dataset(run, device_of(world()))
    for name, value in dataset.fingerprints().items():
        then = manifest.fingerprints.get(name, "none")
        if then != value and not (name == "data" and dataset.store.continues(then)):
            raise CheckpointError(
                f"{found} was trained with {name} {then[:12]}, {value[:12]} is there now: its forecasts "
                "would be de-normalised or ordered wrongly."
            )
    if not (run_dir / surroundings.FILE).exists() and os.access(run_dir, os.W_OK):  # of a run of an older version
        surroundings.keep(dataset.store, dataset.scan, run_dir / surroundings.FILE)
    model = network_of(weights, run)[0].to(dataset.device).eval()
    return Forecaster(run, dataset, model, found, manifest, weights.taken)


@torch.no_grad()
def forecast(forecaster: Forecaster, hour: int, lead_hours: list[int]) -> tuple[Batch, Tensor]:
    """Forecast all targets from the analysis at time index `hour`.

    Returns:
        The batch (one sample a lead time, with persistence, and with the truth where the store reaches to it, NaN elsewhere)
        and (L, T, H, W) in ug m-3.

    Raises:
        DataError: what has to be read is outside the store, or missing.
    """
    wrong = unreadable(forecaster, hour, lead_hours)
    if wrong:
        raise DataError(f"{wrong}. Choose another time.")
    index = SampleIndex(np.full(len(lead_hours), hour), np.array(lead_hours), seed=0)
    raw = next(forecaster.dataset.stream(index).listed(np.arange(len(lead_hours)), len(lead_hours)))
    batch, _, arguments = forecaster.dataset.prepare(raw)
    normalised = finite(forecaster.model(*arguments).float(), "the forecast")
    return batch, forecaster.dataset.normalizer.physical(normalised)


def finite(forecast: Tensor, what: str) -> Tensor:
    """The forecast, if it is one.

    Raises:
        DataError: it has values that are not finite.
    """
    if not torch.isfinite(forecast).all():
        raise DataError(
            f"{what} is not finite: weights are not, or the network overflows. Take an earlier checkpoint with --checkpoint."
        )
    return forecast


def unreadable(forecaster: Forecaster, hour: int, lead_hours: list[int] | None = None) -> str:
    """Why no forecast can start at time index `hour`; empty where one can. The truth need not be there."""
    store, leads = forecaster.dataset.store, lead_hours or forecaster.run.data.lead_hours
    for each in forecaster.dataset.normalizer.reads:
        for at in [hour + lead for lead in leads] if each.back is None else [hour - each.back]:
            if not 0 <= at < len(store.times):
                spanned = f"{store.path} spans {store.times[0]} .. {store.times[-1]}"
                when = store.times[0] + np.timedelta64(at, "h")
                return f"{spanned}; {each.key} at {when} must lie inside"
            if (store.missing[each.group][at] >= 1.0).all():
                return f"{store.path}: {each.group} at {store.times[at]} is wholly missing"
    own_winds = forecaster.dataset.paths is not None and forecaster.dataset.forecast_weather is None
    if own_winds and hour + max(leads) >= len(store.times):
        return f"{store.path} ends at {store.times[-1]}: nobody knows the winds that carry the air until {max(leads)} h later"
    scan, mode = forecaster.dataset.scan, forecaster.run.wind_scan.mode
    if scan is not None and not scan.usable(mode)[hour]:
        return f"{scan.path} knows no wind at {store.times[hour]}"
    return ""


def given_weather(forecaster: Forecaster) -> str:
    """What a score must say of the weather that the forecast was made with."""
    future, given = forecaster.run.data.future, forecaster.dataset.forecast_weather
    if given is not None:
        return f"forecast, of {given.path.name} ({given.fingerprint[:12]}): {', '.join(future)}"
    return f"perfect (analysed) at the valid time: {', '.join(future)}" if future else "of the analysis"


def hour_of(forecaster: Forecaster, time: str | None) -> int:
    """Time index of an ISO time; by default the middle of the test split."""
    store = forecaster.dataset.store
    if time is None:
        inside, longest = store.inside("test"), max(forecaster.run.data.lead_hours)
        possible = np.flatnonzero(inside[: max(0, len(inside) - longest)] & inside[longest:])
        if not len(possible):
            raise DataError(f"{store.path}: no analysis of the test split has a truth {longest} h later: name a time.")
        return int(possible[len(possible) // 2])
    try:
        return int((np.datetime64(time, "h") - store.times[0]).astype(int))
    except ValueError as error:
        raise DataError(f"'{time}' is not a time: write it as {store.times[0]}.") from error
