"""Options and printing of `python -m trainer COMMAND`, a file a command."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer.config import InitFrom


def add_trained_run(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint of which run a command works on."""
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as data.store=PATH for a store that has moved")
    add_raw(parser)
    parser.add_argument("--checkpoint", type=Path, help="one checkpoint directory (default: the newest)")


def add_raw(parser: argparse.ArgumentParser) -> None:
    """Which of the two sets of weights that a run with `ema` has."""
    about = "the weights themselves, where a running mean of them is kept"
    parser.add_argument("--raw", action="store_true", help=about)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Which weights, and how they may differ from the configuration; the keys of `init_from`."""
    add_raw(parser)
    add = parser.add_argument
    add("--take", metavar="NAME", help="which set of weights of a file that holds several")
    order = "channels of a file that does not say: published, configured (data.inputs), or a,b,c"
    add("--channels", type=_channels, metavar="ORDER", help=order)
    add("--allow-missing", action="append", default=[], metavar="NAME", help="repeatable")
    changed = "accept weights of another value of this key, as wind_scan.mode; repeatable"
    add("--allow-change", action="append", default=[], metavar="KEY", help=changed)


def _channels(text: str) -> str | list[str]:
    return text if text in ("published", "configured") else text.split(",")


def source_of(options: argparse.Namespace, path: Path) -> InitFrom:
    """What `add_weights` has parsed."""
    keys = ("raw", "take", "channels", "allow_missing", "allow_change")
    return InitFrom(path=path, **{key: getattr(options, key) for key in keys})
