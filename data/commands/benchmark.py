"""Measure how fast a store is read here, and how many GPUs that feeds."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = "  python -m data benchmark datasets/china.zarr --gpu-samples 20"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lead-hours", type=int, default=24)
    parser.add_argument("--gpu-samples", type=float, default=20.0, help="samples/s that one GPU trains (default 20)")


def run(options: argparse.Namespace) -> None:
    from rich.table import Table

    from data.command_line import console
    from data.store.opening import open_store
    from data.store.speed import measure

    fed = f"GPUs fed at {options.gpu_samples:g} samples/s"
    title = f"{options.store}: one thread, {options.samples} samples at random"
    table = Table("read", "samples/s", "MB/s", "CPU ms/sample", fed, title=title)
    for found in measure(open_store(options.store), options.samples, options.batch, options.lead_hours):
        numbers = (f"{found.samples_per_s:.0f}", f"{found.megabytes_per_s:.0f}", f"{found.cpu_ms_per_sample:.3f}")
        table.add_row(found.what, *numbers, f"{found.samples_per_s / options.gpu_samples:.1f}")
    console().print(table)
