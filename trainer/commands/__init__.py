"""Options and printing of `python -m trainer COMMAND`, a file a command."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_trained_run(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint of which run a command works on."""
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as data.store=PATH for a store that has moved")
    parser.add_argument("--raw", action="store_true", help="the weights themselves, where the run keeps a running mean of them")
    parser.add_argument("--checkpoint", type=Path, help="one checkpoint directory (default: the newest)")
