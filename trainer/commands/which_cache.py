"""Score fixed validation samples with each wind-scan cache and name the one that reproduces the recorded loss."""

from __future__ import annotations

import argparse
from pathlib import Path

from data.command_line import console
from trainer.checkpoint.manifest import CheckpointError
from trainer.commands import add_weights, source_of
from trainer.config_file import load

EXAMPLES = """  python -m trainer which-cache --checkpoint weights/published --config CONFIG \\
      --caches datasets/old.wind_scan datasets/china.wind_scan --val-loss 0.3557"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="weights of any format that import reads")
    add("--caches", type=Path, nargs="+", required=True)
    add("--config", type=Path, required=True)
    add("--val-loss", type=float, help="the loss to reproduce (default: the one recorded with the checkpoint)")
    add("--tolerance", type=float, default=1e-3)
    add_weights(parser)


def run(options: argparse.Namespace) -> None:
    config = load(options.config, [f"wind_scan.cache={options.caches[0]}"])

    import torch
    from rich.table import Table

    from trainer.dataset import open_dataset
    from trainer.scores.scoring import validation_loss
    from trainer.weights.fit import network_of
    from trainer.weights.reading import wanted

    source = source_of(options, options.checkpoint)
    weights = wanted(source)
    recorded = None if weights.record is None else weights.record.val_loss
    loss_then = recorded if options.val_loss is None else options.val_loss
    if loss_then is None:
        raise CheckpointError(f"{options.checkpoint} records no validation loss: give the one to reproduce with --val-loss.")
    losses: dict[Path, float] = {}
    table = Table("cache", "orders", "validation loss", "difference", title=f"recorded: {loss_then:.6f}")
    network = network_of(weights, config, source)[0].eval()
    for cache in options.caches:
        dataset = open_dataset(load(options.config, [f"wind_scan.cache={cache}"]), torch.device("cpu"))
        loss = losses[cache] = validation_loss(network, dataset)
        orders = dataset.fingerprints()["wind_scan_orders"][:12]
        table.add_row(str(cache), orders, f"{loss:.6f}", f"{loss - loss_then:+.6f}")
    console().print(table)
    best = min(losses, key=lambda cache: abs(losses[cache] - loss_then))
    if not abs(losses[best] - loss_then) <= options.tolerance:
        raise CheckpointError(
            f"none of these caches reproduces {loss_then:.6f} within {options.tolerance}; the nearest is {best}."
        )
    print(f"{best} reproduces the recorded loss")
