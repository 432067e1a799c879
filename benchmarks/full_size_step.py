"""The published architecture (52,481,341 parameters, 128 x 256 pixels) does a step on this CPU in under 12 GB.

Times one optimizer step through DeepSpeed, and prints it as a ratio to the same six blocks alone (forward and backward
of plain attention and MLP on given tokens, no variables, no scan, no bias), both measured in this process, in turn.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from trainer import runtime
from trainer.config import load
from trainer.engine import build_engine, resolve_deepspeed, set_learning_rates
from trainer.inputs import architecture
from trainer.model.topoflow import Architecture, Block, TopoFlow

ROOT = Path(__file__).parents[1]
LIMIT_GB = 12.0
ROUNDS = 2


def timed(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def plain_blocks(arch: Architecture, tokens: int) -> Callable[[], None]:
    """Forward and backward of the six blocks on ready tokens, the floor of any implementation."""
    blocks = torch.nn.ModuleList(Block(arch, elevation_bias=False, drop_path=0.0) for _ in range(arch.depth))
    x = torch.randn(1, tokens, arch.width, requires_grad=True)

    def action() -> None:
        y = x
        for block in blocks:
            y = block(y, torch.zeros(1, tokens))
        y.sum().backward()

    return action


def main() -> None:
    run = load(ROOT / "launch/configs/china_128x256.yaml", ["batch.total=1", "batch.micro=1", "precision=fp32"])
    world = runtime.join(run.timeout_minutes)
    torch.manual_seed(0)
    arch = architecture(run)
    model = TopoFlow(arch)
    parameters = sum(p.numel() for p in model.parameters())
    engine = build_engine(model, run, resolve_deepspeed(ROOT / "ds_configs/zero1.json", run, world.size))
    rows, cols = arch.patches
    x = torch.randn(1, arch.variables, *arch.grid, device=world.device)
    target = torch.randn(1, len(arch.target_channels), *arch.grid, device=world.device)
    elevation = torch.rand(rows * cols, device=world.device) * 5000.0
    rank = torch.randperm(rows * cols, device=world.device)[None]

    lead = torch.tensor([24.0], device=world.device)

    def step() -> None:
        set_learning_rates(engine, 0, run)
        loss = (engine(x, lead, elevation, rank) - target).square().mean()
        engine.backward(loss)
        engine.step()

    step()
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    floor = plain_blocks(arch, rows * cols)
    pairs = [(timed(step), timed(floor)) for _ in range(ROUNDS)]
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{parameters:,} parameters, {torch.get_num_threads()} threads, fp32, batch 1")
    print(f"one step: median {statistics.median(a for a, _ in pairs):.1f} s, {ratio:.2f} x its six plain blocks alone")
    print(f"peak memory of the first step: {peak_gb:.2f} GB (limit {LIMIT_GB:g} GB)")
    runtime.leave()
    if peak_gb > LIMIT_GB:
        raise SystemExit(f"peak memory {peak_gb:.2f} GB is over {LIMIT_GB:g} GB")


if __name__ == "__main__":
    main()
