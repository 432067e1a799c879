"""A block with the elevation bias against the same block without, forward and backward; and memory over the tokens.

Width 768, 8 heads, batch 1, fp32.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.measuring import Action, interleaved, peak_gb, ratio
from trainer.model.architecture import Architecture
from trainer.model.topoflow import Block

LIMITS = {2048: 1.3, 4096: 1.1, 8192: 1.1}


def block(tokens: int, bias: bool) -> Action:
    torch.manual_seed(0)
    arch = Architecture(grid=(2, 2 * tokens), variables=15, target_channels=(0,), alpha_init=1.0)
    layer = Block(arch, elevation_bias=bias, drop_path=0.0)
    x = torch.randn(1, tokens, arch.width, requires_grad=True)
    z, grad = torch.rand(1, tokens) * 5000.0, torch.randn(1, tokens, arch.width)

    def action() -> None:
        layer(x, z).backward(grad)

    return action


def main() -> None:
    for tokens, limit in LIMITS.items():
        seconds = interleaved({"biased": block(tokens, True), "plain": block(tokens, False)}, rounds=5)
        added = peak_gb(partial(block, tokens, True))[1]
        print(
            f"{tokens} tokens: with the bias {ratio(seconds, 'biased', 'plain'):.3f} x without (limit {limit}), "
            f"peak {1e6 * added / tokens:.0f} kB a token"
        )


if __name__ == "__main__":
    main()
