"""Training on a GPU at 128 x 256: samples/s, peak memory and MFU by micro-batch, under ZeRO 1 in bf16.

Ours and the obvious implementation, each with and without torch.compile of the blocks; a block with the elevation bias
against one without, and FlexAttention doing the same; and the calls inside a step at which the host would wait for the
device. `--tiny` runs the same code on a small network, on the CPU where there is no GPU: it shows that the script works,
its figures mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import Action, interleaved, ratio
from tests.obvious import Obvious
from trainer.config import Run
from trainer.config_file import load
from trainer.engine import build_engine, dtype_of, resolve_deepspeed
from trainer.model import attention
from trainer.model.architecture import training_flops
from trainer.model.attention import Attention
from trainer.model.elevation_bias import elevation_biased_attention, kernel_name
from trainer.model.topoflow import Block, TopoFlow
from trainer.process import launch
from trainer.run.window import measure_matrix_rate

ROOT = Path(__file__).parents[1]
TINY = ["model.grid=[16, 32]", "model.width=64", "model.depth=2", "model.heads=4", "precision=fp32"]
WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item")


def training_step(run: Run, kind: type[TopoFlow], compiled: bool, device: torch.device) -> tuple[Action, Action]:
    """(a whole step, forward and backward alone) of an engine on random inputs."""
    torch.manual_seed(0)
    model = kind(run.architecture()).to(device)
    if compiled:
        # Its kernels are compiled already, and their choice must not be traced.
        attention.elevation_biased_attention = torch.compiler.disable(elevation_biased_attention)
        for block in model.blocks:
            block.compile(dynamic=False)
    engine = build_engine(model, run, resolve_deepspeed(ROOT / "ds_configs/zero1.json", run, 1))
    arch, micro = model.arch, run.batch.micro
    tokens = arch.patches[0] * arch.patches[1]
    x = torch.randn(micro, arch.variables, *arch.grid, device=device)
    rank = torch.stack([torch.randperm(tokens, device=device) for _ in range(micro)])
    elevation, lead = torch.rand(tokens, device=device) * 5000.0, torch.full((micro,), 24.0, device=device)

    def forward_backward() -> None:
        engine.backward(engine(x, lead, elevation, rank).float().square().mean())

    def step() -> None:
        forward_backward()
        engine.step()

    return step, forward_backward


def measure(run: Run, kind: type[TopoFlow], compiled: bool, device: torch.device, rate: float) -> tuple[float, float, float]:
    """(samples/s, peak GB, MFU)."""
    step, _ = training_step(run, kind, compiled, device)
    cuda = device.type == "cuda"
    for _ in range(3):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    each = statistics.median(seconds)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if cuda else float("nan")
    return run.batch.micro / each, peak, training_flops(run.architecture(), run.batch.micro) / each / rate


class FlexAttention(Attention):
    """The rival: the bias as a score modification that torch compiles into one attention kernel."""

    def forward(self, x: Tensor, elevation: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).transpose(1, 3).unbind(2)
        assert self.elevation_alpha is not None
        slope = self.elevation_alpha.float()[0] / self.H_scale.float()

        def climb_costs(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score - slope * (elevation[b, j] - elevation[b, i]).clamp_min(0)

        return self.proj(flex(x.device)(q, k, v, score_mod=climb_costs).transpose(1, 2).reshape(batch, tokens, width))


@cache
def flex(device: torch.device) -> Callable[..., Tensor]:
    """Compiled where there is a GPU; CPUs have no backward pass of it, and here serve to check the formula."""
    return torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention


def bias_ratio(run: Run, device: torch.device, kind: type[Attention] = Attention) -> float:
    """Time of a block with the elevation bias over one without."""
    arch, dtype = run.architecture(), dtype_of(run)
    tokens = arch.patches[0] * arch.patches[1]
    x = torch.randn(1, tokens, arch.width, device=device, dtype=dtype, requires_grad=True)
    z = torch.rand(1, tokens, device=device) * 5000.0

    def once(bias: bool) -> Callable[[], None]:
        block = Block(arch, first=bias, drop_path=0.0)
        if bias:
            block.attn = kind(arch, first=True)
        block.to(device, dtype)

        def action() -> None:
            block(x, z).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return action

    return ratio(interleaved({"biased": once(True), "plain": once(False)}, rounds=10), "biased", "plain")


def host_waits(run: Run, device: torch.device) -> dict[str, int]:
    """Calls inside forward and backward at which the host waits for the device."""
    _, forward_backward = training_step(run, TopoFlow, False, device)
    forward_backward()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as trace:
        forward_backward()
    return {event.key: event.count for event in trace.key_averages() if event.key in WAITING}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small network in fp32, on any device")
    parser.add_argument("--micro", type=int, nargs="+", default=[1, 2, 4, 8])
    options = parser.parse_args()
    world = launch.join(10.0)
    device = world.device
    if device.type != "cuda" and not options.tiny:
        raise SystemExit("no GPU here: use --tiny to see that the script works, or run it where there is one.")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"

    def run_of(micro: int) -> Run:
        small = TINY if options.tiny else ["precision=bf16"]
        return load(ROOT / "launch/configs/china_128x256.yaml", [f"batch.total={micro}", f"batch.micro={micro}", *small])

    run = run_of(1)
    rate = measure_matrix_rate(device, dtype_of(run))
    title = f"{name}, {rate / 1e12:.1f} TFLOP/s measured"
    table = Table("network", "compiled", "micro-batch", "samples/s", "peak GB", "MFU %", title=title)
    for kind in (TopoFlow, Obvious):
        for compiled in (False, True) if device.type == "cuda" else (False,):
            for micro in options.micro:
                try:
                    speed, peak, mfu = measure(run_of(micro), kind, compiled, device, rate)
                except torch.OutOfMemoryError:
                    table.add_row(kind.__name__, str(compiled), str(micro), "out of memory", "-", "-")
                    continue
                table.add_row(kind.__name__, str(compiled), str(micro), f"{speed:.2f}", f"{peak:.1f}", f"{100 * mfu:.1f}")
    Console(width=110).print(table)
    kernel = kernel_name(device.type, dtype_of(run), run.model.width // run.model.heads)
    print(f"elevation bias by {kernel}: {bias_ratio(run, device):.3f} x a plain block (limit 1.10)")
    print(f"host waits inside forward and backward: {host_waits(run, device) or 'none'}")
    if device.type == "cuda":
        print(f"elevation bias by FlexAttention: {bias_ratio(run, device, FlexAttention):.3f} x a plain block")
    launch.leave()


if __name__ == "__main__":
    main()
