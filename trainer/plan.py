"""`python -m trainer plan`: what a run will need before anything is queued; formulas in docs/operations.md."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from data import variables
from data.store import open_store
from data.stream import index_samples
from data.wind_scan import open_cache
from trainer.command import run_command
from trainer.config import Run, load
from trainer.inputs import architecture
from trainer.model.flops import training_flops
from trainer.model.topoflow import TopoFlow

ZERO_STAGES = (0, 1, 2, 3)


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
VALIDATED = {"FLOPs": "exact (torch's counter)", "bytes a checkpoint": "-1.0 % (demo, ZeRO 1)",
             "memory": "-4 % against the whole process where it was measured: one rank, fp32, CPU"}  # fmt: skip


def parameters_of(run: Run) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in TopoFlow(architecture(run)).parameters())


def state_bytes(parameters: int, precision: str, stage: int, ranks: int) -> float:
    """Weights, gradients and AdamW's state of one rank under ZeRO (Rajbhandari et al. 2020, fig. 1), bytes.

    fp32 under ZeRO keeps a second fp32 copy of the rank's share as its masters.
    """
    weights, gradients = (2, 2) if precision == "bf16" else (4, 4)
    optimizer = 12 if precision == "bf16" or stage > 0 else 8
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


def checkpoint_bytes(parameters: int) -> float:
    """Weights and two moments in fp32, whatever the precision, ZeRO stage and number of ranks."""
    return 12.0 * parameters


def sample_bytes(run: Run) -> float:
    """Read for one sample: weather and chemistry at t, chemistry at t + lead, float32."""
    fields = len(variables.GROUPS["weather"]) + 2 * len(variables.GROUPS["chemistry"])
    return 4.0 * fields * run.model.grid[0] * run.model.grid[1]


def tables(run: Run, ranks: int, gpu: Gpu, mfu: float, zero: int, samples: int | None) -> list[Table]:
    """The plan of a run as tables.

    Raises:
        ConfigError: the global batch cannot be shared by so many ranks.
    """
    parameters, accumulation = parameters_of(run), run.batch.accumulation(ranks)
    peak = gpu.bf16_flops if run.precision == "bf16" else gpu.fp32_flops
    compute = accumulation * training_flops(architecture(run), run.batch.micro) / (peak * mfu)
    sent = communication_bytes(parameters, run.precision, zero, ranks) * (accumulation if zero >= 2 else 1)
    communicate = sent / gpu.network
    step = compute + communicate
    table = Table("quantity", "estimate", "estimate / measurement - 1",
                  title=f"{run.run_dir}: {ranks} ranks, {gpu.title}, ZeRO {zero}, MFU {100 * mfu:.0f} %")  # fmt: skip

    def row(name: str, value: str, validated: str = "not validated") -> None:
        table.add_row(name, value, validated)

    row("parameters", f"{parameters:,}", "exact")
    row("batch", f"{run.batch.total} = {run.batch.micro} micro x {accumulation} accumulated x {ranks} ranks", "exact")
    row("FLOPs a micro-batch, forward and backward", f"{training_flops(architecture(run), run.batch.micro):.3e}",
        VALIDATED["FLOPs"])  # fmt: skip
    row("computing a step", f"{compute:.3f} s")
    row("sent by a rank a step", f"{sent / 1e6:.0f} MB, {communicate:.4f} s at {gpu.network / 1e9:g} GB/s")
    row("share of communication, if none is hidden", f"{100 * communicate / step:.1f} %")
    if samples is not None:
        row("steps an epoch", f"{samples / run.batch.total:.0f} of {samples} samples; {run.steps} steps are "
            f"{run.steps * run.batch.total / samples:.2f} epochs", "exact")  # fmt: skip
    rate = run.batch.total / step
    row("needed from storage", f"{rate:.0f} samples/s, {rate * sample_bytes(run) / 1e9:.2f} GB/s "
        "(less with data.cache_dir)")  # fmt: skip
    size, count = checkpoint_bytes(parameters) / 1e6, run.steps // run.checkpoint.every
    files = 2 + math.ceil(2 * size / 3 / 1000)  # the optimizer's state in files of a gigabyte
    row("a checkpoint", f"{size:.0f} MB in {files} files, {count} of them, {run.checkpoint.keep_last} kept",
        VALIDATED["bytes a checkpoint"])  # fmt: skip
    row("the run", f"{run.steps * step / 86400:.2f} days, {run.steps * step * ranks / 3600:,.0f} GPU-hours, "
        "without validation and start")  # fmt: skip
    memory = Table("ZeRO", "weights, gradients, optimizer", "activations", "a rank in all", f"of {gpu.memory / 1e9:.0f} GB",
                   title=f"memory of a rank ({VALIDATED['memory']})")  # fmt: skip
    for stage in ZERO_STAGES:
        states, activations = state_bytes(parameters, run.precision, stage, ranks), activation_bytes(run)
        share = (states + activations) / gpu.memory
        memory.add_row(str(stage), f"{states / 1e9:.2f} GB", f"{activations / 1e9:.2f} GB",
                       f"{(states + activations) / 1e9:.2f} GB", f"{100 * share:.0f} %")  # fmt: skip
    return [table, memory]


def training_samples(run: Run) -> int | None:
    """Samples of the training split; None where the store is not on this machine."""
    if not Path(run.data.store).exists():
        return None
    store = open_store(run.data.store)
    scan = None if run.wind_scan.cache is None else open_cache(run.wind_scan.cache, store, patch=run.model.patch)
    return len(index_samples(store, "train", run.data.lead_hours, scan, run.wind_scan.mode, run.seed))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m trainer plan --config launch/configs/china_128x256.yaml --gpus 400 --gpu h200",
    )  # fmt: skip
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--gpus", required=True, type=int, help="ranks")
    parser.add_argument("--gpu", required=True, choices=GPUS)
    parser.add_argument("--mfu", type=float, default=0.35, help="share of the peak that training reaches (default 0.35)")
    parser.add_argument("--zero", type=int, choices=ZERO_STAGES, default=1)
    parser.add_argument("overrides", nargs="*", metavar="key=value")

    def command(options: argparse.Namespace) -> None:
        run = load(options.config, options.overrides)
        console, samples = Console(width=max(120, Console().width)), training_samples(run)
        for table in tables(run, options.gpus, GPUS[options.gpu], options.mfu, options.zero, samples):
            console.print(table)
        if samples is None:
            console.print(f"no store at {run.data.store}: steps an epoch are unknown")

    return run_command(argv, parser, command)
