"""What a run must remember, its comparison with the present, and getting it back into an engine.

The same world size and ZeRO stage load DeepSpeed's shards as they are, bit for bit. Another world size (or stage 1 <-> 2)
goes through DeepSpeed's universal checkpoint, converted beside the checkpoint without a command by hand.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from trainer.checkpoint import store
from trainer.checkpoint.store import CheckpointError

log = logging.getLogger("trainer")
TAG = "engine"
CONVERTED = "converted"  # done-mark of a universal form
# A resumed run may differ in these; everything else would silently train another model.
FREE_KEYS = ("run_dir", "steps", "resume", "validation", "checkpoint", "telemetry", "expect", "init_from",
             "max_bad_steps", "data.prefetch", "data.store", "data.cache_dir", "wind_scan.cache", "model.recompute",
             "watch")  # fmt: skip


def compare(
    checkpoint: Path, remembered: dict[str, Any], present: dict[str, Any], allow_change: list[str]
) -> list[dict[str, Any]]:
    """Refuse to resume when the data, the scan or the configuration is not what the checkpoint was trained with.

    Args:
        remembered, present: {"config": tree, "fingerprints": {name: hash}, "optimizer_layout": [...]}.
        allow_change: names of differences to accept, as "optimizer.lr" or "data"; a section's name covers its keys.

    Returns:
        The accepted differences, [{"name", "before", "after"}], for the next manifests.

    Raises:
        CheckpointError: listing every difference that is not allowed.
    """
    differences = []
    for name, value in present["fingerprints"].items():
        differences.append((name, remembered["fingerprints"].get(name), value))
    before, now = _flatten(remembered["config"]), _flatten(present["config"])
    for key in sorted(before.keys() | now.keys()):
        if not _covered(key, FREE_KEYS):
            differences.append((key, before.get(key), now.get(key)))
    # Optimizer state is stored in this order: another order would put it onto the wrong tensors.
    differences.append(("optimizer_layout", remembered["optimizer_layout"], present["optimizer_layout"]))
    changed = [d for d in differences if d[1] != d[2]]
    refused = [d for d in changed if not _covered(d[0], allow_change)]
    if refused:
        listed = "\n".join(f"  {name}: {a} then, {b} now" for name, a, b in refused)
        raise CheckpointError(
            f"{checkpoint} was trained differently:\n{listed}\n"
            "Restore these values, accept each with --allow-change NAME, or start a new run with another run_dir."
        )
    return [{"name": name, "before": a, "after": b} for name, a, b in changed]


def written_by(remembered: dict[str, Any]) -> tuple[int, int]:
    """(world size, ZeRO stage) that wrote a checkpoint, from its manifest."""
    return remembered["world_size"], remembered["zero_stage"]


def make_loadable(checkpoint: Path, remembered: dict[str, Any], world_size: int, zero_stage: int) -> Path | None:
    """Convert to a universal checkpoint if this world size or stage needs it; collective.

    Returns:
        The directory of the universal checkpoint, or None where the shards load as they are.

    Raises:
        CheckpointError: ZeRO 3 and the other stages do not interchange, or the conversion failed.
    """
    before = written_by(remembered)
    if before == (world_size, zero_stage) or (before[1] == zero_stage == 0):
        return None
    if before[1] != zero_stage and not {before[1], zero_stage} <= {1, 2}:
        raise CheckpointError(
            f"{checkpoint} was written under ZeRO {before[1]}, the run asks for ZeRO {zero_stage}: only 1 and 2 interchange. "
            f"Use ds_configs/zero{before[1]}.json, or start a new run with init_from={checkpoint}."
        )
    folder, failure = universal_form(checkpoint), [""]
    if dist.get_rank() == 0 and not (folder / CONVERTED).is_file():
        try:
            seconds = convert(checkpoint)
            log.info("converted %s from %d to %d ranks in %.1f s", checkpoint, before[0], world_size, seconds)
        except CheckpointError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0]:
        raise CheckpointError(failure[0])
    return folder


def universal_form(checkpoint: Path) -> Path:
    """Where the form of a checkpoint lies that any number of ranks can load; whole if it holds CONVERTED."""
    return checkpoint.with_name(checkpoint.name + ".universal")


def convert(checkpoint: Path) -> float:
    """Write the universal form beside a checkpoint of ZeRO 1 to 3; the seconds it took.

    Raises:
        CheckpointError: ZeRO 0, which needs none, or DeepSpeed's conversion failed.
    """
    world_size, stage = written_by(store.manifest(checkpoint))
    if stage == 0:
        raise CheckpointError(f"{checkpoint} was written under ZeRO 0: any number of ranks loads it as it is.")
    folder = universal_form(checkpoint)
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder",
               str(checkpoint / "deepspeed" / TAG), "--output_folder", str(folder / TAG)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckpointError(f"{checkpoint} of {world_size} ranks could not be converted:\n{done.stderr[-2000:]}")
    (folder / CONVERTED).touch()
    return time.monotonic() - started


def load_engine(engine: Any, checkpoint: Path, universal: Path | None) -> None:
    """Load weights and optimizer into the engine; collective.

    Raises:
        CheckpointError: on every rank, if any rank could not load.
    """
    folder = checkpoint / "deepspeed" if universal is None else universal
    if universal is not None:
        _tolerate_an_empty_share(engine.optimizer)
    path, _ = engine.load_checkpoint(str(folder), tag=TAG)
    if universal is not None:
        _give_each_share_its_own_step(engine.optimizer)
    loaded = torch.tensor(0.0 if path is None else 1.0, device=engine.device)
    dist.all_reduce(loaded, op=dist.ReduceOp.MIN)
    if not loaded:
        raise CheckpointError(f"{checkpoint}: DeepSpeed could not load it on every rank. Remove it to use an older one.")


def save_engine(engine: Any, run_dir: Path, step: int, memory: dict[str, Any]) -> store.Saving:
    """Copy weights and optimizer, and start writing them and `memory` as one checkpoint; collective."""
    copies = _Copies()
    engine._copy_recovery_script = lambda folder: None  # weights.safetensors needs no script beside it
    kept, engine.checkpoint_engine = engine.checkpoint_engine, copies
    try:
        # What DeepSpeed's conversion to other world sizes asks for; our own memory is in the manifest.
        state = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
        engine.save_checkpoint("deepspeed", tag=TAG, client_state=state, save_latest=False)
    finally:
        engine.checkpoint_engine = kept
    weights = store.gather_weights(engine)
    if weights:
        copies.states[Path("weights.safetensors")] = weights
    return store.Saving(run_dir, step, memory, copies.states)


class _Copies(CheckpointEngine):
    """What DeepSpeed would write, copied to memory, so that training goes on while a thread of ours writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[Path, Any] = {}

    def create(self, info: Any) -> None: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        self.states[Path(path)] = _copied(state_dict)

    def load(self, path: str, map_location: Any = None) -> None:
        raise NotImplementedError("only for saving")

    def commit(self, info: Any) -> None: ...


def _copied(state: Any) -> Any:
    """`state` with every tensor copied to the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return type(state)((key, _copied(value)) for key, value in state.items())
    if isinstance(state, (list, tuple)) and not hasattr(state, "_fields"):
        return type(state)(_copied(value) for value in state)
    return state


def _tolerate_an_empty_share(optimizer: Any) -> None:
    """Let a rank that holds nothing of the last parameter group load a universal checkpoint.

    That group is one number, elevation_alpha, so most ranks hold none of it. DeepSpeed 0.19.8 then asks for the first of
    no steps and fails, after everything that the rank does hold has been loaded.
    """
    groups = getattr(optimizer, "bit16_groups", None)
    if groups is None or any(parameter._hp_mapping is not None for parameter in groups[-1]):
        return
    load = optimizer.load_hp_checkpoint_state_from_checkpoint_dir

    def load_what_is_held(*arguments: Any) -> None:
        with suppress(IndexError):
            load(*arguments)
        for flat, members in zip(optimizer.single_partition_of_fp32_groups[:-1], groups[:-1], strict=True):
            if (
                any(m._hp_mapping is not None for m in members)
                and not {"exp_avg", "step"} <= optimizer.optimizer.state[flat].keys()
            ):
                raise CheckpointError("DeepSpeed left a parameter group without its optimizer state; nothing was trained.")

    optimizer.load_hp_checkpoint_state_from_checkpoint_dir = load_what_is_held


def _give_each_share_its_own_step(optimizer: Any) -> None:
    """DeepSpeed 0.19.8 gives one `step` tensor to all of ZeRO 3's sub-groups: every one of them would advance it."""
    for state in optimizer.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


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
