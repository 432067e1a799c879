"""Weights of a network with another list of channels: what belongs to a channel is found by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from data.variables import MODEL_INPUTS
from trainer.checkpoint.manifest import MANIFEST, CheckpointError, read_json
from trainer.config_data import Data

# name -> the dimension that counts channels; of the head, of its rows as (pixels of a patch, channels)
ALONG = {"var_embed": 1, "token_embeds.proj_weights": 0, "token_embeds.proj_biases": 0, "head.4.weight": 1, "head.4.bias": 1}


def channels_of(path: Path, count: int) -> list[str] | None:
    """Names of the channels of weights: as one of our checkpoints or exports records them, or those of the published network.

    Raises:
        CheckpointError: the record beside the weights is damaged.
    """
    for file in (path / MANIFEST, path.with_suffix(".json")):
        recorded: Any = read_json(file) if file.is_file() else None
        if isinstance(recorded, dict) and isinstance(recorded.get("config"), dict) and "data" in recorded["config"]:
            try:
                names = Data.model_validate(recorded["config"]["data"]).channels().names
            except ValidationError as error:
                raise CheckpointError(f"{file} does not say which variables its network has ({error}).") from error
            return names if len(names) == count else None
    return list(MODEL_INPUTS) if count == len(MODEL_INPUTS) else None


def by_name(state: dict[str, Tensor], own: dict[str, Tensor], before: list[str], now: list[str]) -> dict[str, Tensor]:
    """The weights with the channels `now` instead of `before`; a channel that was not there starts as in `own`."""
    places = [(now.index(name), before.index(name)) for name in now if name in before]
    here, there = (torch.tensor(column, dtype=torch.int64) for column in zip(*places, strict=True))
    moved = dict(state)
    for name, dim in ALONG.items():
        if name not in state or name not in own:
            continue
        old, new = state[name], own[name].detach().clone().to(state[name].dtype).cpu()
        if name.startswith("head"):
            old, new = old.unflatten(0, (-1, len(before))), new.unflatten(0, (-1, len(now)))
        new.index_copy_(dim, here, old.index_select(dim, there))
        moved[name] = new.flatten(0, 1) if name.startswith("head") else new
    return moved
