"""May this run continue that checkpoint? Compares what was remembered with what is now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.checkpoint.manifest import CheckpointError, Memory

# A resumed run may differ in these; everything else would silently train another model.
FREE_KEYS = (
    "run_dir",
    "steps",
    "resume",
    "validation",
    "checkpoint",
    "telemetry",
    "expect",
    "init_from",
    "max_bad_steps",
    "data.prefetch",
    "data.store",
    "data.cache_dir",
    "wind_scan.cache",
    "model.recompute",
    "spikes.most_roll_backs",
    "watch",
)
# DeepSpeed's keys that say where and when things are kept, sent or printed; state is named, so layouts interchange.
# Any key that is not here, known or not, may change numbers.
FREE_DEEPSPEED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",  # of the run
    "steps_per_print",
    "wall_clock_breakdown",
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
    "dump_state",
    "aio",
    "bf16.enabled",  # of the run, too
    *(
        f"zero_optimization.{key}"
        for key in (
            "stage",
            "reduce_scatter",
            "reduce_bucket_size",
            "allgather_partitions",
            "allgather_bucket_size",
            "overlap_comm",
            "contiguous_gradients",
            "sub_group_size",
            "use_multi_rank_bucket_allreduce",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_use_all_reduce_for_fetch_params",
            "offload_optimizer",
            "offload_param",
            "load_from_fp32_weights",
            "memory_efficient_linear",
        )
    ),
)


def compare(
    checkpoint: Path, remembered: Memory, present: Memory, allow_change: list[str], earlier: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Refuse to resume when the data, the scan or a configuration is not what the checkpoint was trained with.

    Args:
        earlier: fingerprints of the store before hours were appended to it, which changed nothing that was there.
        allow_change: names of differences to accept, as "optimizer.lr" or "data"; a section's name covers its keys.

    Returns:
        The accepted differences, [{"name", "before", "after"}], for the next manifests.

    Raises:
        CheckpointError: listing every difference that is not allowed.
    """
    differences = [(name, remembered.fingerprints.get(name), value) for name, value in present.fingerprints.items()]
    differences += _differences(remembered.config, present.config, FREE_KEYS)
    differences += [
        (f"deepspeed.{key}", a, b) for key, a, b in _differences(remembered.deepspeed, present.deepspeed, FREE_DEEPSPEED_KEYS)
    ]
    differences += [(f"parameters.{key}", a, b) for key, a, b in _differences(remembered.parameters, present.parameters, ())]
    changed = [d for d in differences if d[1] != d[2]]
    refused = [d for d in changed if not _covered(d[0], allow_change) and not (d[0] == "data" and d[1] in earlier)]
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
