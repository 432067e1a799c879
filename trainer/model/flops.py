"""Floating-point operations of the network, from its architecture alone; a multiply-add counts as two."""

from __future__ import annotations

from trainer.model.topoflow import Architecture


def forward_flops(arch: Architecture) -> dict[str, int]:
    """Matrix-product operations of one forward pass, by component.

    "fold" is paid once a micro-batch (the tables of the embedding do not depend on the sample), the rest once a sample.
    Element-wise work and the extra dimensions of the elevation bias are left out, as is usual for MFU.
    """
    (rows, cols), variables, width, heads = arch.patches, arch.variables, arch.width, arch.heads
    tokens, area = rows * cols, arch.patch**2
    hidden = int(width * arch.mlp_ratio)
    outputs = len(arch.target_channels) * area
    terms = variables * (area + 1)
    return {
        # query, its probe into the keys, value bias; scores, values and their output projection as tables
        "fold": 2 * (3 * width * width + heads * width * terms + 2 * width * width * terms),
        "embedding": 2 * tokens * (variables * area * heads * variables + heads * terms * width) + 2 * width,
        "linear": arch.depth * 2 * tokens * (4 * width * width + 2 * width * hidden),
        "attention": arch.depth * 4 * tokens * tokens * width,
        "head": 2 * tokens * (2 * width * width + width * outputs),
    }


def training_flops(arch: Architecture, micro: int) -> int:
    """Operations of forward and backward over a micro-batch; what is recomputed is not counted (it is no progress)."""
    parts = forward_flops(arch)
    return 3 * (parts.pop("fold") + micro * sum(parts.values()))
