"""What a run will need, before anything is queued; formulas in docs/operations.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.table import Table

from data.channels.channels import STATIC
from trainer.config import Run
from trainer.model.architecture import parameter_count, training_flops

ZERO_STAGES = (0, 1, 2, 3)
UNCHECKED = "not validated"


@dataclass(frozen=True)
class Gpu:
    """One rank's device, by its makers' data sheets."""

    title: str
    bf16_flops: float  # dense, 1/s
    fp32_flops: float
    memory: float  # bytes
    network: float  # bytes/s a rank between nodes, one direction


GPUS = {
    "h100": Gpu("NVIDIA H100 SXM", 989e12, 67e12, 80e9, 50e9),
    "h200": Gpu("NVIDIA H200 SXM", 989e12, 67e12, 141e9, 50e9),
    "mi250x": Gpu("AMD MI250X, one of its two dies", 191.5e12, 47.9e12, 64e9, 12.5e9),
}
# Estimate over measurement, less 1, where one could be measured; the commands are in docs/benchmarks.md.
VALIDATED = {
    "FLOPs": "exact (torch's counter)",
    "bytes a checkpoint": "-1.0 % (demo, ZeRO 1)",
    "memory": "-4 % against the whole process where it was measured: one rank, fp32, CPU",
}


def parameters_of(run: Run) -> int:
    """Numbers that are trained."""
    return parameter_count(run.architecture())


def state_bytes(parameters: int, precision: str, stage: int, ranks: int, ema: bool = False) -> float:
    """Weights, gradients and AdamW's state of one rank under ZeRO (Rajbhandari et al. 2020, fig. 1), bytes.

    fp32 under ZeRO keeps a second fp32 copy of the rank's share as its masters.
    """
    weights, gradients = (2, 2) if precision == "bf16" else (4, 4)
    optimizer = (12 if precision == "bf16" or stage > 0 else 8) + 4 * ema
    shares = [1 / ranks if stage >= first else 1 for first in (3, 2, 1)]
    return parameters * sum(size * share for size, share in zip((weights, gradients, optimizer), shares, strict=True))


def activation_bytes(run: Run) -> float:
    """What forward keeps for backward, bytes: per token 34 numbers of 2 bytes x width a block (Korthikanti et al. 2022,
    without the attention matrix, which is never stored), or 1 where blocks are recomputed."""
    model, bytes_each = run.model, 2 if run.precision == "bf16" else 4
    tokens = model.grid[0] * model.grid[1] // model.patch**2
    kept = 1 if model.recompute == "blocks" else (17 if model.recompute == "none" else 13)
    return run.batch.micro * tokens * model.width * bytes_each * (model.depth * kept + 17)


def communication_bytes(parameters: int, precision: str, stage: int, ranks: int) -> float:
    """Sent by a rank in one step: reduce-scatter and all-gather of everything, at stage 3 one more all-gather."""
    each = 2 if precision == "bf16" else 4
    return (3 if stage == 3 else 2) * parameters * each * (ranks - 1) / ranks


def checkpoint_bytes(parameters: int, ema: bool = False) -> float:
    """Weights, their running mean where one is kept, and two moments in fp32, whatever the precision, stage and ranks."""
    return (16.0 if ema else 12.0) * parameters


def sample_bytes(run: Run) -> float:
    """Read for one sample: inputs with time at t, targets at t + lead, float32; more where a run leaves some of a group out."""
    stored = run.data.channels().stored
    fields = sum(name not in STATIC for name, _ in stored) + len(run.data.targets)
    return 4.0 * fields * run.model.grid[0] * run.model.grid[1]


def tables(run: Run, ranks: int, gpu: Gpu, mfu: float, zero: int, samples: int | None) -> list[Table]:
    """The plan of a run as tables: what it costs, and the memory of a rank at every ZeRO stage.

    Args:
        mfu: share of the device's peak that training reaches.
        samples: in the training split, where that is known.

    Raises:
        ConfigError: the global batch cannot be shared by so many ranks.
    """
    title = f"{run.run_dir}: {ranks} ranks, {gpu.title}, ZeRO {zero}, MFU {100 * mfu:.0f} %"
    quantities = Table("quantity", "estimate", "estimate / measurement - 1", title=title)
    for name, estimate, validated in _quantities(run, ranks, gpu, mfu, zero, samples):
        quantities.add_row(name, estimate, validated)

    title = f"memory of a rank ({VALIDATED['memory']})"
    share_of = f"of {gpu.memory / 1e9:.0f} GB"
    memory = Table("ZeRO", "weights, gradients, optimizer", "activations", "a rank in all", share_of, title=title)
    for stage in ZERO_STAGES:
        states, activations = (
            state_bytes(parameters_of(run), run.precision, stage, ranks, run.ema is not None),
            activation_bytes(run),
        )
        sizes = [f"{size / 1e9:.2f} GB" for size in (states, activations, states + activations)]
        memory.add_row(str(stage), *sizes, f"{100 * (states + activations) / gpu.memory:.0f} %")
    return [quantities, memory]


def _quantities(run: Run, ranks: int, gpu: Gpu, mfu: float, zero: int, samples: int | None) -> list[tuple[str, str, str]]:
    """(what, how much, how that was checked)."""
    parameters, batch = parameters_of(run), run.batch
    accumulation = batch.accumulation(ranks)
    flops = training_flops(run.architecture(), batch.micro)
    peak = gpu.bf16_flops if run.precision == "bf16" else gpu.fp32_flops
    compute = accumulation * flops / (peak * mfu)
    sent = communication_bytes(parameters, run.precision, zero, ranks) * (accumulation if zero >= 2 else 1)
    communicate = sent / gpu.network
    step = compute + communicate
    rate = batch.total / step
    size = checkpoint_bytes(parameters, run.ema is not None) / 1e6
    saved = run.steps // run.checkpoint.every
    files = 2 + math.ceil(2 * size / 3 / 1000)  # the optimizer's state in files of a gigabyte
    whole = f"{batch.total} = {batch.micro} micro x {accumulation} accumulated x {ranks} ranks"
    days, hours = run.steps * step / 86400, run.steps * step * ranks / 3600
    found = [
        ("parameters", f"{parameters:,}", "exact"),
        ("batch", whole, "exact"),
        ("FLOPs a micro-batch, forward and backward", f"{flops:.3e}", VALIDATED["FLOPs"]),
        ("computing a step", f"{compute:.3f} s", UNCHECKED),
        ("sent by a rank a step", f"{sent / 1e6:.0f} MB, {communicate:.4f} s at {gpu.network / 1e9:g} GB/s", UNCHECKED),
        ("share of communication, if none is hidden", f"{100 * communicate / step:.1f} %", UNCHECKED),
    ]
    if samples is not None:
        epochs = run.steps * batch.total / samples
        epoch = f"{samples / batch.total:.0f} of {samples} samples; {run.steps} steps are {epochs:.2f} epochs"
        found.append(("steps an epoch", epoch, "exact"))
    needed = f"{rate:.0f} samples/s, {rate * sample_bytes(run) / 1e9:.2f} GB/s (less with data.cache_dir)"
    found.append(("needed from storage", needed, UNCHECKED))
    kept = f"{size:.0f} MB in {files} files, {saved} of them, {run.checkpoint.keep_last} kept"
    found.append(("a checkpoint", kept, VALIDATED["bytes a checkpoint"]))
    found.append(("the run", f"{days:.2f} days, {hours:,.0f} GPU-hours, without validation and start", UNCHECKED))
    return found
