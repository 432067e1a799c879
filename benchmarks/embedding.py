"""Embedding and aggregation of 15 variables, forward and backward: ours against patch convolutions + MultiheadAttention.

The published sizes: 128 x 256 pixels, width 768, 8 heads, batch 1, fp32.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path

import torch

from benchmarks.measuring import Action, interleaved, peak_gb, ratio
from tests import obvious
from trainer.config_file import load
from trainer.model.embedding import embed_and_aggregate
from trainer.model.topoflow import TopoFlow

CONFIG = Path(__file__).parents[1] / "launch/configs/china_128x256.yaml"


def aggregation(folded: bool) -> Action:
    torch.manual_seed(0)
    arch = load(CONFIG, ["model.depth=1"]).architecture()
    model = TopoFlow(arch)
    x = torch.randn(1, arch.variables, *arch.grid)
    grad = torch.randn(1, arch.patches[0] * arch.patches[1], arch.width)

    def action() -> None:
        model.zero_grad()
        if folded:
            scores, values, bias = model.var_agg(model.var_query, model.token_embeds(model.var_embed)[0])
            tokens = embed_and_aggregate(model._pixels(x), scores, values, bias, torch.float32)
        else:
            tokens = obvious.aggregate(model, x)
        tokens.backward(grad)

    return action


def main() -> None:
    ours, theirs = (peak_gb(partial(aggregation, folded))[1] for folded in (True, False))
    seconds = interleaved({"ours": aggregation(True), "obvious": aggregation(False)}, rounds=3)
    print(
        f"embedding + aggregation: median {statistics.median(seconds['ours']):.3f} s, "
        f"obvious {ratio(seconds, 'obvious', 'ours'):.0f} x slower (at least 40)"
    )
    print(f"peak memory: {1000 * ours:.0f} MB, obvious {1000 * theirs:.0f} MB, 1/{theirs / ours:.0f} (limit 1/15)")


if __name__ == "__main__":
    main()
