"""One optimizer step of the published network (52,481,341 parameters, 128 x 256 pixels, batch 1, fp32) on this CPU.

Against its own six blocks alone on given tokens (no variables, no scan, no bias), and against the obvious implementation
of the same network: variable tokens, tokens moved into scan order and back, the bias as a matrix.
"""

from __future__ import annotations

import argparse
import os
import statistics
from functools import partial
from pathlib import Path

import torch

from benchmarks.measuring import Action, interleaved, peak_gb, ratio
from tests.obvious import Obvious
from trainer.config_file import load
from trainer.engine import build_engine, resolve_deepspeed, set_learning_rates
from trainer.model.architecture import Architecture
from trainer.model.topoflow import Block, PositionsAlongWind, TopoFlow
from trainer.process import launch

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "launch/configs/china_128x256.yaml"
OVERRIDES = ["batch.total=1", "batch.micro=1", "precision=fp32"]


def given(arch: Architecture) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The model's arguments, and a target."""
    tokens = arch.patches[0] * arch.patches[1]
    x = torch.randn(1, arch.variables, *arch.grid)
    arguments = (x, torch.tensor([24.0]), torch.rand(tokens) * 5000.0, torch.randperm(tokens)[None])
    return arguments, torch.randn(1, len(arch.target_channels), *arch.grid)


def step_of(kind: type[TopoFlow]) -> Action:
    """Through DeepSpeed, dropout and stochastic depth as configured (the obvious implementation has none to pay for)."""
    run = load(CONFIG, OVERRIDES)
    torch.manual_seed(0)
    model = kind(run.architecture())
    engine = build_engine(model, run, resolve_deepspeed(ROOT / "ds_configs/zero1.json", run, 1))
    arguments, target = given(model.arch)

    def step() -> None:
        set_learning_rates(engine, 0, run)
        engine.backward((engine(*arguments) - target).square().mean())
        engine.step()

    return step


def step_alone(kind: type[TopoFlow]) -> Action:
    launch.join(10.0)
    return step_of(kind)


def plain_blocks(arch: Architecture) -> Action:
    """Forward and backward of the six blocks on ready tokens, the floor of any implementation."""
    tokens = arch.patches[0] * arch.patches[1]
    blocks = torch.nn.ModuleList(Block(arch, first=False, drop_path=0.0) for _ in range(arch.depth))
    x = torch.randn(1, tokens, arch.width, requires_grad=True)

    def action() -> None:
        y = x
        for block in blocks:
            y = block(y, torch.zeros(1, tokens))
        y.sum().backward()

    return action


def scan(arch: Architecture) -> Action:
    """What the wind scan adds to a step: position embeddings gathered by rank, and back."""
    tokens = arch.patches[0] * arch.patches[1]
    positions = torch.randn(tokens, arch.width, requires_grad=True)
    rank, tokens_grad = torch.randperm(tokens)[None], torch.randn(1, tokens, arch.width)
    return lambda: PositionsAlongWind.apply(positions, rank).backward(tokens_grad)


def compare_memory() -> None:
    ours, theirs = (peak_gb(partial(step_alone, kind)) for kind in (TopoFlow, Obvious))
    print(f"a step needs {ours[1]:.2f} GB, the obvious one {theirs[1]:.2f} GB: {ours[1] / theirs[1]:.2f} x (limit 0.4)")
    shares = f"{ours[0]:.2f} and {theirs[0]:.2f} GB: {ours[0] / theirs[0]:.2f} x"
    print(f"  with interpreter, weights and moments {shares}", flush=True)


def compare_with_blocks(rounds: int) -> None:
    arch = load(CONFIG, OVERRIDES).architecture()
    parameters = sum(p.numel() for p in TopoFlow(arch).parameters())
    seconds = interleaved({"ours": step_of(TopoFlow), "blocks": plain_blocks(arch), "scan": scan(arch)}, rounds)
    print(f"{parameters:,} parameters, {torch.get_num_threads()} threads, fp32, batch 1, {rounds} rounds")
    print(f"one step: median {statistics.median(seconds['ours']):.1f} s")
    pairs = ", ".join(f"{a / b:.3f}" for a, b in zip(seconds["ours"], seconds["blocks"], strict=True))
    print(f"  {ratio(seconds, 'ours', 'blocks'):.3f} x its six plain blocks alone (limit 1.06; pairs {pairs})")
    print(f"  wind scan {100 * ratio(seconds, 'scan', 'ours'):.2f} % of the step (limit 1 %)", flush=True)


def compare_with_obvious(rounds: int) -> None:
    seconds = interleaved({"ours": step_of(TopoFlow), "obvious": step_of(Obvious)}, rounds)
    print(f"obvious implementation {ratio(seconds, 'obvious', 'ours'):.2f} x ours (at least 1.2)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="against the blocks; 2 against the obvious implementation")
    rounds = parser.parse_args().rounds
    compare_memory()
    os.environ.pop("MASTER_PORT", None)
    launch.join(10.0)
    # Apart: the obvious step leaves its 9 GB to be mapped anew by whoever comes next.
    compare_with_blocks(rounds)
    compare_with_obvious(min(rounds, 2))
    launch.leave()


if __name__ == "__main__":
    main()
