"""What a run must remember, and its comparison with the present."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.checkpoint.store import CheckpointError

# A resumed run may differ in these; everything else would silently train another model.
FREE_KEYS = ("run_dir", "steps", "resume", "timeout_minutes", "validation", "checkpoint", "telemetry", "expect",
             "data.prefetch", "data.store", "wind_scan.cache", "model.recompute")  # fmt: skip


def compare(checkpoint: Path, remembered: dict[str, Any], present: dict[str, Any]) -> None:
    """Refuse to resume when the data, the scan or the configuration is not what the checkpoint was trained with.

    Args:
        remembered, present: {"config": tree, "fingerprints": {name: hash}, "world_size": int, "zero_stage": int}.

    Raises:
        CheckpointError: listing every difference.
    """
    differences = []
    for name, value in present["fingerprints"].items():
        before = remembered["fingerprints"].get(name)
        if before != value:
            differences.append(f"{name}: {before} then, {value} now")
    before, now = _flatten(remembered["config"]), _flatten(present["config"])
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not any(key == f or key.startswith(f + ".") for f in FREE_KEYS):
            differences.append(f"{key}: {before.get(key)} then, {now.get(key)} now")
    for key in ("world_size", "zero_stage"):
        if remembered[key] != present[key]:
            differences.append(f"{key}: {remembered[key]} then, {present[key]} now")
    if differences:
        listed = "\n".join(f"  {d}" for d in differences)
        raise CheckpointError(
            f"{checkpoint} was trained differently:\n{listed}\n"
            "Restore these values, or start a new run with another run_dir (or resume=never)."
        )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
