"""What lies beside imported and exported weights: statistics, losses, reports."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trainer.checkpoint.manifest import MANIFEST, CheckpointError, read, read_json
from trainer.foreign.report import ImportReport

RECORD = "recorded.json"  # beside imported weights that came with a record
RECORDED = {"statistics", "fingerprints", "val_loss", "val_step", "step"}
REPORT = "import.json"


def recorded_beside(path: Path) -> dict[str, Any] | None:
    """What one of our checkpoints, exports or imports records with its weights: statistics, fingerprints and the
    validation loss of these very weights (or None); None for a foreign file, whatever JSON lies beside it.

    Raises:
        CheckpointError: a record of ours is damaged.
    """
    if (path / MANIFEST).is_file():
        m = read(path)
        return {
            "statistics": m.statistics,
            "fingerprints": m.fingerprints,
            "val_loss": m.own_val_loss,
            "val_step": m.progress.val_step,
            "step": m.step,
        }
    for file in (path / RECORD, path.with_suffix(".json")):
        recorded = read_json(file) if file.is_file() else None
        if isinstance(recorded, dict) and recorded.keys() >= RECORDED:
            val_loss = recorded["val_loss"] if recorded["val_step"] == recorded["step"] else None
            return {key: recorded[key] for key in RECORDED} | {"val_loss": val_loss}
    return None


def direction_of(path: Path) -> str | None:
    """The model.elevation_bias that one of our checkpoints or exports was trained with; None for a foreign file.

    Raises:
        CheckpointError: a record of ours is damaged.
    """
    file = path.with_suffix(".json")
    if (path / MANIFEST).is_file():
        config: Any = read(path).config
    else:
        recorded = read_json(file) if file.is_file() else None
        config = recorded.get("config") if isinstance(recorded, dict) else None
    model = config.get("model") if isinstance(config, dict) else None
    bias = model.get("elevation_bias") if isinstance(model, dict) else None
    return {True: "descent", False: "none"}[bias] if isinstance(bias, bool) else bias


def write_report(report: ImportReport, path: Path, **more: str) -> None:
    """As JSON; `more` beside it."""
    path.write_text(json.dumps(report.to_json() | more, indent=1))


def write_whole(path: Path, write: Callable[[Path], None]) -> Path:
    """Under its own name only once it is whole.

    Raises:
        CheckpointError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        return partial.rename(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # what the writers raise on a full disk
        raise CheckpointError(f"{path} could not be written ({error}).") from error
    finally:
        partial.unlink(missing_ok=True)
