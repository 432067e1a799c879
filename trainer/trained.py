"""A trained network and its inputs, from a run directory; what evaluation, forecasts and plots start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import DataError
from data.batch import Batch
from data.stream import SampleIndex
from trainer.checkpoint import store
from trainer.checkpoint.manifest import CheckpointError, Manifest
from trainer.checkpoint.pretrained import ImportReport, match, read_tensors
from trainer.config import Run, validate
from trainer.inputs import Inputs, architecture, open_inputs
from trainer.model.compat import translate
from trainer.model.topoflow import START_AT_ZERO, TopoFlow


@dataclass
class Trained:
    run: Run
    inputs: Inputs
    model: TopoFlow
    checkpoint: Path
    manifest: Manifest


def load_trained(run_dir: Path, checkpoint: Path | None = None, overrides: list[str] | None = None) -> Trained:
    """Rebuild the network of a checkpoint (default: the newest of `run_dir`) with the statistics it was trained with.

    Args:
        overrides: `key=value`, as data.store=PATH for a store that has moved.

    Raises:
        CheckpointError: none there, damaged, or the store or wind-scan cache is no longer the one it was trained on.
        DataError: the store or the cache cannot be opened.
    """
    found = checkpoint or store.newest(run_dir)
    if found is None:
        raise CheckpointError(f"no checkpoint in {run_dir}. Train one first, or name another run directory.")
    manifest = store.manifest(found)
    run = validate(manifest.config, str(found / "manifest.json"), overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = open_inputs(run, device)
    for name, value in inputs.fingerprints().items():
        then = manifest.fingerprints.get(name, "none")
        if then != value:
            raise CheckpointError(f"{found} was trained with {name} {then[:12]}, {value[:12]} is there now: its forecasts "
                                  "would be de-normalised or ordered wrongly.")  # fmt: skip
    model = TopoFlow(architecture(run))
    with store.reading(found):
        weights = store.load_weights(found)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    _, report = match(str(found), weights, expected, [], START_AT_ZERO)
    report.refuse_unless_complete()
    model.load_state_dict(weights)
    return Trained(run, inputs, model.to(device).eval(), found, manifest)


@torch.no_grad()
def forecast(trained: Trained, hour: int, lead_hours: list[int]) -> tuple[Batch, Tensor]:
    """Forecast all targets from the analysis at time index `hour`.

    Returns:
        The batch (one sample a lead time, with truth and persistence) and (L, T, H, W) in ug m-3.

    Raises:
        DataError: analysis or verifying time is outside the store.
    """
    store = trained.inputs.store
    if hour < 0 or hour + max(lead_hours) >= len(store.times):
        raise DataError(f"{store.path} spans {store.times[0]} .. {store.times[-1]}; analysis and lead times must lie inside.")
    absent = [group for group in store.missing if (store.missing[group][hour] >= 1.0).all()]
    if absent:
        raise DataError(f"{store.path}: {' and '.join(absent)} at {store.times[hour]} are wholly missing: choose another time.")
    index = SampleIndex(np.full(len(lead_hours), hour), np.array(lead_hours), seed=0)
    raw = next(trained.inputs.stream(index).listed(np.arange(len(lead_hours)), len(lead_hours)))
    batch, _, arguments = trained.inputs.prepare(raw)
    return batch, trained.inputs.normalizer.physical(trained.model(*arguments).float())


def hour_of(trained: Trained, time: str | None) -> int:
    """Time index of an ISO time; by default the middle of the test split."""
    store = trained.inputs.store
    if time is None:
        first, last = store.split("test")
        return first + (last - first - max(trained.run.data.lead_hours)) // 2
    try:
        return int((np.datetime64(time, "h") - store.times[0]).astype(int))
    except ValueError as error:
        raise DataError(f"'{time}' is not a time: write it as {store.times[0]}.") from error


def import_weights(model: TopoFlow, path: Path, allow_missing: list[str]) -> tuple[dict[str, Tensor], ImportReport]:
    """Read, translate and match foreign weights; nothing is changed in `model`, nothing is refused yet.

    Returns:
        fp32 tensors by our names, and the report.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    foreign = read_tensors(path)
    translated = translate(foreign.tensors, expected)
    parameters = {name: shape for name, shape in expected.items() if name != "blocks.0.attn.H_scale"}
    scale = translated.state.pop("blocks.0.attn.H_scale", None)
    tensors, report = match(str(path), translated.state, parameters, allow_missing, START_AT_ZERO)
    if scale is not None and float(scale) != 1000.0:
        report.misshapen["blocks.0.attn.H_scale"] = f"{float(scale)} m in the file, 1000 m here"
    report.remapped, report.ignored = translated.remapped, translated.ignored
    report.taken, report.also = foreign.taken, foreign.also
    return tensors, report
