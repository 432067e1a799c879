"""Score fixed validation samples with each wind-scan cache and name the one that reproduces the recorded loss."""

from __future__ import annotations

import argparse
from pathlib import Path

from data.command_line import console
from trainer.checkpoint.manifest import CheckpointError
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
    add("--allow-missing", action="append", default=[], metavar="NAME")


def run(options: argparse.Namespace) -> None:
    config = load(options.config, [f"wind_scan.cache={options.caches[0]}"])

    import torch
    from rich.table import Table

    from trainer.dataset import open_dataset
    from trainer.foreign.records import recorded_beside
    from trainer.foreign.weights import network_with
    from trainer.scores.scoring import validation_loss

    recorded = recorded_beside(options.checkpoint)
    wanted = options.val_loss if recorded is None or options.val_loss is not None else recorded["val_loss"]
    if wanted is None:
        raise CheckpointError(f"{options.checkpoint} records no validation loss: give the one to reproduce with --val-loss.")
    losses: dict[Path, float] = {}
    table = Table("cache", "orders", "validation loss", "difference", title=f"recorded: {wanted:.6f}")
    network = network_with(config, options.checkpoint, options.allow_missing)[0].eval()
    for cache in options.caches:
        dataset = open_dataset(load(options.config, [f"wind_scan.cache={cache}"]), torch.device("cpu"))
        loss = losses[cache] = validation_loss(network, dataset)
        orders = dataset.fingerprints()["wind_scan_orders"][:12]
        table.add_row(str(cache), orders, f"{loss:.6f}", f"{loss - wanted:+.6f}")
    console().print(table)
    best = min(losses, key=lambda cache: abs(losses[cache] - wanted))
    if not abs(losses[best] - wanted) <= options.tolerance:
        raise CheckpointError(
            f"none of these caches reproduces {wanted:.6f} within {options.tolerance}; the nearest is {best}."
        )
    print(f"{best} reproduces the recorded loss")
