"""May this run continue that checkpoint? Whose history it is, and what was different then."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.process.written import write_text
from trainer.checkpoint.manifest import CheckpointError, Manifest, Memory, read_json

IDENTITY = "run.json"  # in the run directory

log = logging.getLogger("trainer")

# A resumed run may differ in these keys of its configuration and of DeepSpeed's, which say where and
# when things are kept, sent or printed (state is named, so layouts interchange; batch, clipping and
# type are those of the run). Any other key, known or not, may change numbers, and would silently
# train another model.
FREE = {
    "run": (
        "run_dir", "steps", "resume", "validation", "checkpoint", "telemetry", "expect", "init_from", "max_bad_steps",
        "watch", "data.prefetch", "data.store", "data.cache_dir", "wind_scan.cache", "wind_paths.cache",
        "model.recompute",
        "spikes.most_roll_backs",
    ),
    "deepspeed": (
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
        "bf16.enabled", "steps_per_print", "wall_clock_breakdown", "comms_logger", "flops_profiler", "memory_breakdown",
        "dump_state", "aio",
        *(f"zero_optimization.{key}" for key in (
            "stage", "reduce_scatter", "reduce_bucket_size", "allgather_partitions", "allgather_bucket_size",
            "overlap_comm", "contiguous_gradients", "sub_group_size", "use_multi_rank_bucket_allreduce",
            "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
            "stage3_gather_16bit_weights_on_model_save", "stage3_use_all_reduce_for_fetch_params", "offload_optimizer",
            "offload_param", "load_from_fp32_weights", "memory_efficient_linear",
        )),
    ),
}  # fmt: skip


def identity(run_dir: Path) -> tuple[str, int | None]:
    """Name of the run that a directory belongs to, and step of its last checkpoint; or ("", None).

    A directory of before runs had a name has its history in what it has logged.

    Raises:
        CheckpointError: what is written there is no identity.
    """
    saved = None
    if (run_dir / IDENTITY).exists():
        tree = read_json(run_dir / IDENTITY)
        if isinstance(tree, dict) and isinstance(tree.get("run"), str):
            saved = tree.get("saved")
            return tree["run"], saved if isinstance(saved, int) else None
        raise CheckpointError(f"{run_dir / IDENTITY} is damaged: remove it, checkpoints say it too.")
    logged = run_dir / "metrics.jsonl"
    for line in logged.read_text(errors="replace").splitlines() if logged.is_file() else ():
        if '"kind": "checkpoint"' in line:
            with suppress(ValueError, KeyError):  # a kill may have cut a row short
                saved = int(json.loads(line)["step"])
    return "", saved


def remember(run_dir: Path, run: str, saved: int | None) -> None:
    """Write down whose directory it is, and the step of its last checkpoint."""
    write_text(run_dir / IDENTITY, json.dumps({"run": run, "saved": saved}))


def require_own(run_dir: Path, found: Manifest | None) -> None:
    """Refuse a history without its checkpoints, or with those of another run.

    Raises:
        CheckpointError: a start would drop what was trained, or continue what another run trained.
    """
    own, saved = identity(run_dir)
    if found is None and saved is not None:
        raise CheckpointError(
            f"{run_dir} has the history of a run that has saved step {saved}, and no checkpoint is "
            f"there: mount or restore {run_dir}/checkpoints. To begin anew, choose another run_dir."
        )
    if found is not None and own and found.run and own != found.run:
        raise CheckpointError(
            f"the checkpoints in {run_dir} are of another run ({found.run[:8]}, not {own[:8]}): "
            "bring back its own, or choose another run_dir and start from them with "
            f"init_from.path={run_dir}/checkpoints/step-{found.step:08d}."
        )
    if found is not None and saved is not None and saved > found.step:
        told = f"the last checkpoint of {run_dir} was that of step {saved}, and is not there"
        log.error("WARNING: %s: it goes on from step %d, and trains again", told, found.step)


def compare(
    checkpoint: Path,
    remembered: Memory,
    present: Memory,
    allow_change: list[str],
    same_data: Callable[[str], bool] = lambda _: False,
) -> list[dict[str, Any]]:
    """Refuse to resume when the data, the scan or a configuration is not what the checkpoint was trained with.

    Args:
        same_data: whether the store is that of a fingerprint, or the same with later hours.
        allow_change: names of differences to accept, as "optimizer.lr" or "data"; a section's name
            covers its keys.

    Returns:
        The accepted differences, [{"name", "before", "after"}], for the next manifests.

    Raises:
        CheckpointError: listing every difference that is not allowed.
    """
    differences = [(name, remembered.fingerprints.get(name), value) for name, value in present.fingerprints.items()]
    differences += _differences(remembered.config, present.config, FREE["run"])
    for name, free in (("deepspeed", FREE["deepspeed"]), ("parameters", ())):
        found = _differences(getattr(remembered, name), getattr(present, name), free)
        differences += [(f"{name}.{key}", a, b) for key, a, b in found]
    changed = [d for d in differences if d[1] != d[2]]
    refused = [d for d in changed if not _covered(d[0], allow_change)]
    refused = [d for d in refused if d[0] != "data" or not same_data(str(d[1]))]
    if refused:
        listed = "\n".join(f"  {name}: {a} then, {b} now" for name, a, b in refused[:20])
        more = f"\n  and {len(refused) - 20} more" if len(refused) > 20 else ""
        raise CheckpointError(
            f"{checkpoint} was trained differently:\n{listed}{more}\n"
            "Restore these values, accept each with --allow-change NAME, or start a new run with another run_dir."
        )
    return [{"name": name, "before": a, "after": b} for name, a, b in changed]


def _differences(before: dict[str, Any], now: dict[str, Any], free: tuple[str, ...]) -> list[tuple[str, Any, Any]]:
    flat_before, flat_now = _flatten(before), _flatten(now)
    return [
        (key, flat_before.get(key), flat_now.get(key))
        for key in sorted(flat_before.keys() | flat_now.keys())
        if not _covered(key, free)
    ]


def _covered(key: str, names: tuple[str, ...] | list[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in names)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
