"""Days, GPU-hours, memory, storage and network that a run will need, before anything is queued."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from data.command_line import console
from trainer.config import Run
from trainer.config_file import load
from trainer.preflight.plan import GPUS, ZERO_STAGES, tables

EXAMPLES = "  python -m trainer plan --config launch/configs/china_128x256.yaml --gpus 400 --gpu h200"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", required=True, type=Path)
    add("--gpus", required=True, type=int, help="ranks")
    add("--gpu", required=True, choices=GPUS)
    add("--mfu", type=float, default=0.35, help="share of the peak that training reaches (default 0.35)")
    add("--zero", type=int, choices=ZERO_STAGES, default=1)
    add("overrides", nargs="*", metavar="key=value")


def run(options: argparse.Namespace) -> None:
    config = load(options.config, options.overrides)
    screen, samples = console(120), training_samples(config)
    for table in tables(config, options.gpus, GPUS[options.gpu], options.mfu, options.zero, samples):
        screen.print(table)
    if samples is None:
        print(f"no store at {config.data.store}: steps an epoch are unknown")


def training_samples(config: Run) -> int | None:
    """Samples of the training split; None where the store is not on this machine."""
    if not config.data.store.exists():
        return None

    from data.samples import index_samples
    from data.splits import hours_of
    from data.store.opening import open_store
    from data.wind_scan.cache import open_cache

    store, scan, days = open_store(config.data.store), config.wind_scan, config.data.days()
    cache = None if scan.cache is None else open_cache(scan.cache, store, patch=config.model.patch)
    if days is not None:
        store = replace(store, splits={name: hours_of(store, name, ranges) for name, ranges in days.items()})
    channels = config.data.channels()
    store.contents.require([*channels.inputs, *channels.future], str(store.path))
    reads = channels.reads(store.contents)
    return len(index_samples(store, "train", config.data.lead_hours, cache, scan.mode, config.seed, reads))
