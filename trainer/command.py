"""What commands share: parsing, and refusals that are one screen instead of a traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from data import DataError
from trainer.checkpoint.manifest import CheckpointError
from trainer.config import ConfigError

EXIT_INTERRUPTED = 130


class LaunchError(Exception):
    """The launcher's variables are incomplete or contradict one another, or the run directory is not this job's."""


class TrainingError(Exception):
    """Training itself went wrong: too many steps in a row had to be skipped."""


REFUSALS = (ConfigError, DataError, CheckpointError, LaunchError, TrainingError)


def run_parser(command: str, description: str | None, example: str) -> argparse.ArgumentParser:
    """The parser of a command that works on a trained run."""
    parser = argparse.ArgumentParser(
        prog=f"python -m trainer {command}", description=description,
        epilog=f"example:\n  python -m trainer {command} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as data.store=PATH for a store that has moved")
    parser.add_argument("--checkpoint", type=Path, help="one checkpoint directory (default: the newest)")
    return parser


def run_command(argv: list[str], parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], None]) -> int:
    """Parse, run, and turn refusals into a one-screen message; the exit code."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(argv)
    try:
        command(options)
    except (*REFUSALS, OSError) as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what has its final name is whole, the rest was not kept", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0
