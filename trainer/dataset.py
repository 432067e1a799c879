"""What a run reads, opened as its configuration says; shared by training, evaluation and forecasts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data import DataError
from data.batch import Batch, Example, Normalizer
from data.channels import climatology
from data.channels.channels import EVERY_H
from data.channels.climatology import Climatology
from data.channels.transport import Transport
from data.samples import SampleIndex, index_samples
from data.splits import split_as
from data.store import node_copy
from data.store.layout import Store
from data.stream import Stream
from data.wind_paths import cache as wind_paths
from data.wind_paths.cache import PathCache
from data.wind_scan.cache import ScanCache, open_cache
from trainer.checkpoint.consistency import on_main
from trainer.config import Run
from trainer.model.compat import legacy_orders, moved_arguments, release_orders
from trainer.model.topoflow import patch_mean


@dataclass
class Dataset:
    """The opened store and wind-scan cache, and what turns their batches into model arguments."""

    run: Run
    store: Store
    scan: ScanCache | None
    normalizer: Normalizer
    elevation: Tensor  # (N,) mean elevation of every patch, m
    device: torch.device
    usual: Climatology | None = None  # where the network predicts the change
    paths: PathCache | None = None  # of the air
    forecast_weather: Store | None = None  # instead of the analysed weather of the valid time

    def index(self, split: str) -> SampleIndex:
        run, mode = self.run, self.run.wind_scan.mode
        return index_samples(self.store, split, run.data.lead_hours, self.scan, mode, run.seed, self.normalizer.reads)

    def stream(self, index: SampleIndex) -> Stream:
        mode, patches = self.run.wind_scan.mode, len(self.elevation)
        pin, reads = self.device.type == "cuda", self.normalizer.reads
        how = self.scan, mode, self.run.data.prefetch, patches, pin, reads
        return Stream(self.store, index, *how, self.forecast_weather, self.paths)

    def prepare(self, batch: Batch) -> tuple[Batch, Example, tuple[Any, ...]]:
        """A batch on the device, its normalised example, and the model's arguments."""
        batch = batch.to(self.device)
        example = self.normalizer(batch)
        elevation, patch = self.elevation, self.run.model.patch
        if self.run.elevation_as_given:
            elevation = patch_mean(example.inputs[:, self.run.data.inputs.index("elevation")], patch)
        if self.run.wind_scan.of_old_code:
            orders = legacy_orders if self.run.wind_scan.mode == "legacy" else release_orders
            return batch, example, moved_arguments(example.inputs, batch.lead_hours, elevation, patch, orders)
        arguments = (example.inputs, batch.lead_hours, elevation, batch.rank)
        departure = None
        if self.usual is not None:
            now, then = (self.usual.at(hours) for hours in (batch.hours, batch.valid_hours))
            departure = self.normalizer.departure(batch, now, then)
        if self.run.model.sources:
            return batch, example, (*arguments, departure, self._air(batch, example))
        return batch, example, arguments if departure is None else (*arguments, departure)

    def _air(self, batch: Batch, example: Example) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Places, factors, ages and numbers of the points of the air's paths."""
        transport, ways = self.normalizer.transport, example.ways
        assert transport is not None
        assert ways is not None
        factors = transport.factors(ways, self.normalizer.valid_time(batch), self.run.model.sources)
        counts = 1 + (batch.valid_hours - batch.hours) // EVERY_H
        return transport.places(ways), factors, ways.ages, counts.tolist()

    def validation_set(self) -> str:
        """What a validation loss is a loss on."""
        data = self.run.data
        leads, targets = ", ".join(map(str, data.lead_hours)), ", ".join(data.targets)
        content = self.store.origin[:16] + self.store.chosen[:16]
        return f"{content}: {self.run.validation.samples} samples, {leads} h, {targets}"

    def fingerprints(self) -> dict[str, str]:
        scan = self.scan.orders_hash if self.scan is not None else self.run.wind_scan.mode
        own = {"splits": self.store.chosen} if self.store.chosen else {}
        own |= {} if self.paths is None else {"wind_paths": self.paths.sha256}
        return {"data": self.store.fingerprint, "wind_scan_orders": scan, **own}


def open_dataset(run: Run, device: torch.device) -> Dataset:
    """Open everything a run reads.

    Raises:
        DataError: a store or cache is absent, stale, or of another grid, or `data.cache_dir` cannot be filled.
    """
    store, scan, paths = on_main(lambda: _open(run))
    if run.data.cache_dir is not None and dist.is_initialized():
        store = node_copy.copied(store, run.data.cache_dir)
    transport = None if paths is None else Transport(store, paths.geometry, device)
    normalizer = Normalizer(store, run.data.channels(), run.data.targets, device, transport)
    elevation = patch_mean(torch.from_numpy(store.static["elevation"])[None], run.model.patch)[0].to(device)
    dataset = Dataset(run, store, scan, normalizer, elevation, device, paths=paths)
    if run.model.predict == "change":
        dataset.usual = open_climatology(dataset)
    return dataset


def open_climatology(dataset: Dataset) -> Climatology:
    """What is usual, of the run's training split; collective, where there are ranks."""
    run, store = dataset.run, dataset.store

    def read() -> tuple[np.ndarray, np.ndarray]:
        run.run_dir.mkdir(parents=True, exist_ok=True)
        return climatology.kept(store, run.run_dir)

    return Climatology(store, run.data.targets, *on_main(read), dataset.device)


def _open(run: Run) -> tuple[Store, ScanCache | None, PathCache | None]:
    """What is checked is checked once, by rank 0, and what it found goes to the others: hours of data cost them nothing."""
    from data.store.opening import open_store  # zarr is for the one rank that opens

    store = open_store(run.data.store)
    if store.grid != run.model.grid:
        raise DataError(
            f"{store.path} has a grid of {store.grid[0]} x {store.grid[1]}, model.grid is {run.model.grid[0]} x "
            f"{run.model.grid[1]}. Set model.grid={list(store.grid)}, or point data.store at another store."
        )
    cache, days = run.wind_scan.cache, run.data.days()
    scan = None if cache is None else open_cache(cache, store, patch=run.model.patch)
    paths, longest = run.wind_paths.cache, max(run.data.lead_hours)
    air = None if paths is None else wind_paths.open_cache(paths, store, patch=run.model.patch, hours=longest)
    return store if days is None else split_as(store, days), scan, air
