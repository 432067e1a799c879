"""One micro-batch: raw fields as read, and their normalisation on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data import DataError
from data.channels.channels import OF_PATHS, Channels, Read
from data.channels.sun import cosine_of_zenith, season
from data.channels.transport import Transport, Ways
from data.store.layout import Store


@dataclass
class Batch:
    """Raw fields of B samples, in the units of their variables, NaN where missing."""

    fields: dict[str, Tensor]  # what is read, by its key: "weather" (B, V, H, W) at t, "weather@-6h", "weather@+lead"
    target: Tensor  # (B, V, H, W) chemistry at t + lead
    lead_hours: Tensor  # (B,) float32
    rank: Tensor  # (B, N) int64, place of every patch along the wind
    hours: np.ndarray  # (B,) time index of t in the store
    valid_hours: np.ndarray  # (B,) of t + lead, which may lie beyond it
    position: int  # of the first sample in the global stream, or in the list it comes from
    counted: Tensor  # (B,) bool; False for samples that only fill up a rank's last evaluation batch
    paths: Tensor | None = None  # (B, points, 2, P) int8 steps of the air before t + lead (wind_paths/cache.py)

    def to(self, device: torch.device) -> Batch:
        """Copy to `device`; from pinned memory, without waiting, where there is a GPU."""

        def move(tensor: Tensor) -> Tensor:
            if tensor.device.type == device.type:
                return tensor
            return tensor.pin_memory().to(device, non_blocking=True)

        return Batch(
            {group: move(tensor) for group, tensor in self.fields.items()},
            move(self.target),
            move(self.lead_hours),
            move(self.rank),
            self.hours,
            self.valid_hours,
            self.position,
            move(self.counted),
            None if self.paths is None else move(self.paths),
        )


def ahead_on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on `device`, each copied on a stream of its own while the GPU computes on the one before it."""
    if device.type != "cuda":
        yield from batches
        return
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def start() -> Batch | None:
        batch = next(batches, None)
        with torch.cuda.stream(copying):
            return None if batch is None else batch.to(device)

    coming = start()
    while coming is not None:
        computing.wait_stream(copying)
        here = coming
        for tensor in (*here.fields.values(), here.target, here.lead_hours, here.rank, here.counted, here.paths):
            if tensor is None:
                continue
            tensor.record_stream(computing)  # or its memory could be handed out again while it is still read
        coming = start()
        yield here


@dataclass
class Example:
    """What the model and the loss see, on the device."""

    inputs: Tensor  # (B, V, H, W) normalised, missing cells at the training mean; V as in Channels.names
    targets: Tensor  # (B, T, H, W) normalised; 0 where missing
    weight: Tensor  # (B, T, H, W) area x domain x validity, mean 1 over the domain where nothing is missing
    missing_inputs: Tensor  # () share of input cells that were filled
    ways: Ways | None = None  # of the air, where the run has paths


class _Scale:
    """Some variables in physical units <-> in deviations from the training mean, of their logarithms where that is asked."""

    def __init__(self, store: Store, names: list[str], logarithmic: Sequence[str], device: torch.device) -> None:
        def column(key: str) -> Tensor:
            keys = [f"log_{key}" if name in logarithmic else key for name in names]
            numbers = [store.statistics[name][own] for name, own in zip(names, keys, strict=True)]
            return torch.tensor(numbers, device=device)[:, None, None].float()

        self.mean, self.std = column("mean"), column("std")
        self._log = torch.tensor([name in logarithmic for name in names], device=device)[:, None, None]
        self._any_log = any(name in logarithmic for name in names)

    def normalised(self, fields: Tensor) -> Tensor:
        if self._any_log:
            fields = torch.where(self._log, fields.log1p(), fields)
        return (fields - self.mean) / self.std

    def physical(self, fields: Tensor) -> Tensor:
        fields = fields * self.std + self.mean
        return torch.where(self._log, fields.expm1(), fields) if self._any_log else fields


class Normalizer:
    """Turns a raw batch into a normalised example, with the statistics of the store's training split.

    Static fields are kept on the device. `area` is cos(latitude) inside the domain mask and 0 outside, scaled
    to a mean of one over the domain.
    """

    def __init__(
        self,
        store: Store,
        channels: Channels,
        targets: list[str],
        device: torch.device,
        transport: Transport | None = None,
    ) -> None:
        held, inputs = store.contents, list(channels.inputs)
        held.require([*inputs, *channels.future, *targets], str(store.path))
        for name in targets:
            if held.group(name) != "chemistry":
                raise DataError(f"target '{name}' is not a pollutant; possible: {held.names('chemistry')}.")
        self.inputs, self.targets, self.statistics = inputs, targets, store.statistics
        self.device, self.transport = device, transport
        self.channels, self.reads = channels, channels.reads(held)

        for name in inputs:
            if not store.statistics[name]["std"] > 0.0:
                raise DataError(f"{store.path}: '{name}' is constant and cannot be normalised: remove it from data.inputs.")

        flat = [name for name in channels.logarithmic if "log_mean" not in store.statistics[name]]
        if flat:
            raise DataError(f"{store.path}: no statistics of logarithms of {', '.join(flat)}: remove it from data.transform.")
        self._inputs = _Scale(store, [name for name, _ in channels.stored], channels.logarithmic, device)
        self._targets = _Scale(store, targets, channels.logarithmic, device)
        self.target_std = _Scale(store, targets, (), device).std  # ug m-3, of what scores are made of
        self.static = torch.stack([torch.from_numpy(store.static[n]) for n in held.names("static")]).to(device)
        cosine = np.cos(np.deg2rad(store.lat))[:, None] * store.static["domain_mask"]
        if not cosine.any():
            raise DataError(f"{store.path}: domain_mask is empty; there is nothing to train on.")
        self.area = torch.from_numpy(cosine * cosine.size / cosine.sum()).float().to(device)
        self._target_channels = [held.channel(name) for name in targets]
        self._places = [(Read(held.group(name), back).key, held.channel(name)) for name, back in channels.stored]
        hours = (store.times.astype("datetime64[h]") - np.datetime64("1970-01-01T00", "h")).astype("f8")
        self._hours = torch.from_numpy(hours).to(device)  # since 1970, of every time index
        self._lat, self._lon = (torch.from_numpy(np.asarray(axis, "f8")).to(device) for axis in (store.lat, store.lon))

    def __call__(self, batch: Batch) -> Example:
        """Normalise; a missing input becomes the training mean, a missing target gets zero weight."""
        raw = self._stack(batch)
        valid = torch.isfinite(raw)
        inputs = torch.where(valid, self._inputs.normalised(raw), 0.0)
        target = batch.target[:, self._target_channels]
        known = torch.isfinite(target)
        targets = torch.where(known, self._targets.normalised(target), 0.0)
        ways = None
        if self.transport is not None and batch.paths is not None:
            ways = self.transport.ways(batch.paths, batch.lead_hours)
        if self.channels.derived:
            inputs = torch.cat([inputs, self._derived(batch, ways)], 1)
        return Example(inputs, targets, known * self.area, (~valid).float().mean(), ways)

    def physical(self, targets: Tensor) -> Tensor:
        """Normalised (B, T, H, W) targets -> ug m-3, none of them negative."""
        return self._targets.physical(targets).clamp(min=0.0)

    def departure(self, batch: Batch, usual_now: Tensor, usual_then: Tensor) -> Tensor:
        """(B, 2, T, H, W) normalised: the analysis' anomaly, 0 where it is missing, and what is usual at the valid time."""
        now, then = (self._targets.normalised(usual).nan_to_num(0.0) for usual in (usual_now, usual_then))
        analysis = self._targets.normalised(self.persistence(batch))
        return torch.stack([torch.where(torch.isfinite(analysis), analysis - now, 0.0), then], 1)

    def persistence(self, batch: Batch) -> Tensor:
        """The pollutants at t as a forecast of t + lead, (B, T, H, W) ug m-3, NaN where missing."""
        return batch.fields["chemistry"][:, self._target_channels]

    def truth(self, batch: Batch) -> Tensor:
        """(B, T, H, W) ug m-3 at t + lead, NaN where missing."""
        return batch.target[:, self._target_channels]

    def valid_time(self, batch: Batch) -> Tensor:
        """(B,) float64 hours since 1970 of t + lead."""
        return self._hours[torch.from_numpy(batch.hours).to(self.device)] + batch.lead_hours.double()

    def _derived(self, batch: Batch, ways: Ways | None) -> Tensor:
        """(B, D, H, W) of time, place and the paths of the air."""
        valid = self.valid_time(batch)
        hours = valid - batch.lead_hours.double()
        planes: list[Tensor] = []
        for key in self.channels.derived:
            if key in OF_PATHS:
                assert self.transport is not None
                assert ways is not None
                if key == "carried":
                    carried = self.transport.carried(self.persistence(batch), ways)
                    planes += self._targets.normalised(carried).nan_to_num(0.0).unbind(1)
                else:
                    planes += self.transport.exposure(ways).unbind(1)
            elif key == "sun":
                planes += [cosine_of_zenith(time, self._lat, self._lon) for time in (hours, valid)]
            else:
                shape = (len(hours), len(self._lat), len(self._lon))
                planes += [part[:, None, None].expand(shape) for part in season(hours)]
        return torch.stack(planes, 1).float()

    def _stack(self, batch: Batch) -> Tensor:
        groups = batch.fields | {"static": self.static.expand(len(batch.lead_hours), -1, -1, -1)}
        planes = [groups[group][:, channel] for group, channel in self._places]
        return torch.stack(planes, dim=1)
