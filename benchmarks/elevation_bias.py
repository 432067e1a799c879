"""A block with the elevation bias, in either direction, and one with the relative position bias, against the same block
without, forward and backward; and memory over the tokens.

Width 768, 8 heads, batch 1, fp32.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.measuring import Action, interleaved, peak_gb, ratio
from trainer.model.architecture import Architecture
from trainer.model.topoflow import Block

LIMITS = {2048: 1.3, 4096: 1.1, 8192: 1.1}
GRID_ROWS = 64  # patches
KINDS = {"descent": {"bias": "descent"}, "climb": {"bias": "climb"}, "relative": {"relative": True}}


def block(tokens: int, bias: str = "none", relative: bool = False) -> Action:
    torch.manual_seed(0)
    grid = (2 * GRID_ROWS, 2 * tokens // GRID_ROWS)
    arch = Architecture(grid, 15, (0,), alpha_init=1.0, elevation_bias=bias, relative_position=relative)
    layer = Block(arch, first=True, drop_path=0.0)
    if layer.attn.relative_position is not None:
        torch.nn.init.normal_(layer.attn.relative_position)
    x = torch.randn(1, tokens, arch.width, requires_grad=True)
    z, grad = torch.rand(1, tokens) * 5000.0, torch.randn(1, tokens, arch.width)

    def action() -> None:
        layer(x, z).backward(grad)

    return action


def main() -> None:
    for tokens, limit in LIMITS.items():
        kinds = {name: partial(block, tokens, **changes) for name, changes in KINDS.items()}
        seconds = interleaved({"plain": block(tokens)} | {name: make() for name, make in kinds.items()}, rounds=5)
        for name, make in kinds.items():
            limited = "" if name == "relative" else f" (limit {limit})"
            print(
                f"{tokens} tokens: {name} {ratio(seconds, name, 'plain'):.3f} x a plain block{limited}, "
                f"peak {1e6 * peak_gb(make)[1] / tokens:.0f} kB a token",
                flush=True,
            )


if __name__ == "__main__":
    main()
