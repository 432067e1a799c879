"""Weights of a file for a network that no configuration file describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.config import InitFrom, Run
from trainer.model.architecture import Architecture
from trainer.model.topoflow import TopoFlow
from trainer.weights.fit import fit
from trainer.weights.reading import wanted
from trainer.weights.report import ImportReport


def run_of(arch: Architecture, **changes: Any) -> Run:
    """A run whose network is `arch`, with the published channels."""
    keys = ("grid", "patch", "width", "depth", "heads", "dropout", "drop_path", "elevation_bias", "bias_floor")
    keys += ("relative_position", "first_block_dropout", "embedding_norm")
    model = {key: getattr(arch, key) for key in keys}
    tree = {"run_dir": "/nowhere", "steps": 10, "data": {"store": "/nowhere.zarr"}, "model": model}
    return Run.model_validate(tree | changes)


def import_weights(
    network: TopoFlow, path: Path, allow_missing: list[str] | None = None, **source: Any
) -> tuple[dict[str, Tensor], ImportReport]:
    """What a file holds for the network, and the report; nothing is refused yet."""
    given = InitFrom(path=path, allow_missing=allow_missing or [], **source)
    return fit(wanted(given), network, run_of(network.arch), given)
