"""What a checkpoint holds, by parameter name, from its files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer.checkpoint.manifest import CheckpointError
from trainer.checkpoint.state import WEIGHTS_FILE, Named
from trainer.checkpoint.store import manifest
from trainer.checkpoint.zero import EMA


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The fp32 parameters by name.

    Raises:
        CheckpointError: the file is absent or damaged.
    """
    return _load(checkpoint / WEIGHTS_FILE)


def load_averaged(checkpoint: Path) -> dict[str, Tensor]:
    """Parameters and buffers by name, with the running mean of those that have one.

    Raises:
        CheckpointError: a file is absent or damaged, or no mean was kept.
    """
    named = load(checkpoint)
    means = {name: named.moments[f"{name}.{EMA}"] for name in named.weights if f"{name}.{EMA}" in named.moments}
    if not means:
        raise CheckpointError(f"{checkpoint} holds no running mean of the weights: its run had no `ema`.")
    return named.weights | means


def load(checkpoint: Path) -> Named:
    """Weights and optimizer state of a checkpoint, in memory.

    Raises:
        CheckpointError: a file is absent or damaged.
    """
    moments: dict[str, Tensor] = {}
    for name in manifest(checkpoint).files:
        if Path(name) != WEIGHTS_FILE:
            moments |= _load(checkpoint / name)
    return Named(load_weights(checkpoint), moments)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
