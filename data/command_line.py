"""What the commands of both packages share: a table of them, options, and refusals of one screen.

A command is a module, imported when it is called: its docstring describes it, EXAMPLES shows it, `add_arguments(parser)`
takes options and `run(options)` does the work (REPORTS_ITS_ERRORS: and reports its errors). It imports torch, xarray and
the like inside `run`, so that help, and what needs only a few files, starts at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data import Refusal

if TYPE_CHECKING:
    from rich.console import Console

EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130
EXIT_UNREAD = 141  # nobody reads what is printed any more


@dataclass(frozen=True)
class Command:
    """Where a command is, and what it does in a line."""

    module: str
    summary: str


def open_streams() -> None:
    """Give standard streams that were closed, as by `2>&-`, a place to go to."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # so Python marks a closed one
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - as long as the process


def run_command(package: str, description: str, commands: dict[str, Command], argv: list[str]) -> int:
    """Run `python -m PACKAGE ARGV`; the exit code.

    Args:
        commands: by name, of one word or two ("wind-scan compare").
    """
    open_streams()
    two_words = " ".join(argv[:2])
    name, own = (two_words, argv[2:]) if two_words in commands else (argv[0] if argv else "", argv[1:])
    if name not in commands:
        _choose(package, description, commands).parse_args(argv)
        raise AssertionError("argparse has refused what is no command")
    module = importlib.import_module(commands[name].module)
    parser = argparse.ArgumentParser(
        prog=f"python -m {package} {name}",
        description=module.__doc__,
        epilog=f"examples:\n{module.EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of refusals")
    options = parser.parse_intermixed_args(own)
    code = module.run(options) if hasattr(module, "REPORTS_ITS_ERRORS") else _run(module, options)
    return code or 0


def _run(module: Any, options: argparse.Namespace) -> int | None:
    """Do what was asked for, and turn refusals into a one-screen message."""
    try:
        code: int | None = module.run(options)
        return code
    except BrokenPipeError:  # of `| head`
        # Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_UNREAD
    except (Refusal, OSError) as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        print("interrupted: what has its final name is whole, the rest was not kept", file=sys.stderr)
        return EXIT_INTERRUPTED


def console(width: int = 110) -> Console:
    """For tables on standard output, which need that width also where it is a file."""
    from rich.console import Console

    return Console(width=max(width, Console().width))


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _choose(package: str, description: str, commands: dict[str, Command]) -> argparse.ArgumentParser:
    widest = max(map(len, commands))
    listing = "\n".join(f"  {name:{widest}s}  {command.summary}" for name, command in commands.items())
    parser = argparse.ArgumentParser(
        prog=f"python -m {package}",
        description=description,
        epilog=f"commands:\n{listing}\n\nexample:\n  python -m {package} {next(iter(commands))} --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands, metavar="COMMAND")
    return parser
