"""Foreign weights load completely or not at all: read one file, match by name and shape, report, refuse.

Knows files and tensors; which foreign key means which parameter is the caller's `translate` (trainer/model/compat.py).
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer.checkpoint.store import CheckpointError

FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
RECORD = "recorded.json"  # beside imported weights that came with a record
GATE = 0.9999  # share of parameters that must load, the allow-list aside


@dataclass
class ImportReport:
    """What an import would load, by parameter count."""

    source: str
    expected: dict[str, int]  # name -> parameters
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: dict[str, int] = field(default_factory=dict)
    misshapen: dict[str, str] = field(default_factory=dict)  # name -> "(60, 768) in the file, (768, 768) here"
    remapped: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    allowed_missing: list[str] = field(default_factory=list)

    def parameters(self, names: list[str]) -> int:
        return sum(self.expected[name] for name in names)

    @property
    def share(self) -> float:
        """Share of the network's parameters that load, those that may be missing left out."""
        needed = sum(self.expected.values()) - self.parameters(self.allowed_missing)
        return self.parameters(self.loaded) / needed if needed else 0.0

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen) and self.share >= GATE

    def to_json(self) -> dict[str, Any]:
        total = sum(self.expected.values())
        return {
            "source": self.source, "parameters": total, "share_loaded": self.share, "complete": self.complete,
            "loaded": len(self.loaded), "missing": self.missing, "unexpected": sorted(self.unexpected),
            "misshapen": self.misshapen, "allowed_missing": self.allowed_missing, "remapped": self.remapped,
            "ignored": self.ignored,
        }  # fmt: skip

    def show(self, console: Console) -> None:
        """Print counts and shares, and every key that is not simply loaded."""
        total = sum(self.expected.values())
        table = Table("", "tensors", "parameters", "share", title=f"import of {self.source}")
        rows = [
            ("loaded", len(self.loaded), self.parameters(self.loaded)),
            ("missing, allowed", len(self.allowed_missing), self.parameters(self.allowed_missing)),
            ("missing", len(self.missing), self.parameters(self.missing)),
            ("misshapen", len(self.misshapen), self.parameters(list(self.misshapen))),
            ("unexpected in the file", len(self.unexpected), sum(self.unexpected.values())),
        ]
        for label, tensors, parameters in rows:
            table.add_row(label, str(tensors), f"{parameters:,}", f"{100 * parameters / total:.4f} %")
        console.print(table)
        for label, names in (("missing", self.missing), ("unexpected", sorted(self.unexpected)), ("ignored", self.ignored)):
            for name in names:
                console.print(f"  {label}: {name}")
        for name, shapes in self.misshapen.items():
            console.print(f"  misshapen: {name}: {shapes}")
        for old, new in self.remapped.items():
            console.print(f"  remapped: {old} -> {new}", style="dim")

    def refuse_unless_complete(self) -> None:
        """Raises CheckpointError naming what keeps the import from being complete."""
        if self.complete:
            return
        wrong = [f"missing {n}" for n in self.missing] + [f"misshapen {n}: {s}" for n, s in self.misshapen.items()]
        wrong += [f"unexpected {n}" for n in self.unexpected]
        listed = "\n".join(f"  {line}" for line in wrong[:12])
        more = f"\n  and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        raise CheckpointError(
            f"{self.source} loads {100 * self.share:.4f} % of the parameters, all are needed:\n{listed}{more}\n"
            "Make the model section equal to the file's architecture; only what --allow-missing names may be absent."
        )


def match(
    source: str,
    state: dict[str, Tensor],
    expected: dict[str, torch.Size],
    allow_missing: list[str],
) -> tuple[dict[str, Tensor], ImportReport]:
    """Match translated tensors with the network's, by name and shape.

    Args:
        allow_missing: last parts of names that need not be in the file, as "elevation_alpha".

    Returns:
        The tensors to load, in fp32, and the report.
    """
    report = ImportReport(source, {name: shape.numel() for name, shape in expected.items()})
    tensors = {}
    for name, shape in expected.items():
        if name not in state:
            allowed = name.rsplit(".", 1)[-1] in allow_missing
            (report.allowed_missing if allowed else report.missing).append(name)
        elif state[name].shape != shape:
            report.misshapen[name] = f"{tuple(state[name].shape)} in the file, {tuple(shape)} here"
        else:
            tensors[name] = state[name].float()
            report.loaded.append(name)
    report.unexpected = {name: tensor.numel() for name, tensor in state.items() if name not in expected}
    return tensors, report


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of any format, without executing anything in it.

    Accepts safetensors, a state dict or Lightning checkpoint written by torch.save, one of our checkpoint directories,
    or a DeepSpeed checkpoint directory.

    Raises:
        CheckpointError: absent, of no known format, or it holds more than tensors and plain values.
    """
    if not path.exists():
        raise CheckpointError(f"no weights at {path}.")
    if path.is_dir():
        return _read_directory(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", mmap=_is_zip(path), weights_only=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and plain values, and is not opened: {error}") from error
    state = content.get("state_dict", content.get("module", content)) if isinstance(content, dict) else content
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path} holds no named tensors: expected a state dict or a checkpoint with 'state_dict'.")
    return tensors


def _read_directory(path: Path) -> dict[str, Tensor]:
    if (path / "weights.safetensors").is_file():
        return load_file(path / "weights.safetensors")
    if (path / "latest").is_file():
        path = path / (path / "latest").read_text().strip()
    if any(path.glob("*_optim_states.pt")):
        return _read_deepspeed(path)
    if (path / "mp_rank_00_model_states.pt").is_file():  # stage 0 keeps its weights here alone
        return read_tensors(path / "mp_rank_00_model_states.pt")
    raise CheckpointError(f"{path} is not a checkpoint directory: no weights.safetensors and no DeepSpeed states in it.")


def _read_deepspeed(path: Path) -> dict[str, Tensor]:
    """The fp32 masters of ZeRO 1 to 3, merged by DeepSpeed; only its own three plain classes may be rebuilt."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    before = os.environ.get(FORCE_WEIGHTS_ONLY)
    os.environ[FORCE_WEIGHTS_ONLY] = "1"  # the function would otherwise unpickle anything
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]), redirect_stdout(sys.stderr):
            merged = get_fp32_state_dict_from_zero_checkpoint(str(path.parent), path.name)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and plain values, and is not opened: {error}") from error
    finally:
        if before is None:
            del os.environ[FORCE_WEIGHTS_ONLY]
        else:
            os.environ[FORCE_WEIGHTS_ONLY] = before
    return {name: tensor.detach() for name, tensor in merged.items()}


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def recorded_beside(path: Path) -> dict[str, Any] | None:
    """What one of our checkpoints, exports or imports records with its weights: statistics, fingerprints and the
    validation loss of these very weights (or None); None for a foreign file.
    """
    for file in (path / "manifest.json", path / RECORD, path.with_suffix(".json")):
        if file.is_file():
            recorded: dict[str, Any] = json.loads(file.read_text())
            val_loss = recorded["val_loss"] if recorded["val_step"] == recorded["step"] else None
            return {"statistics": recorded["statistics"], "fingerprints": recorded["fingerprints"], "val_loss": val_loss,
                    "val_step": recorded["val_step"], "step": recorded["step"]}  # fmt: skip
    return None


def write_report(report: ImportReport, path: Path) -> None:
    path.write_text(json.dumps(report.to_json(), indent=1))
