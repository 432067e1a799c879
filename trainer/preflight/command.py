"""Check everything that can be known before a job is queued, on a login node or one GPU.

Each check says what it found; one that fails says what to do. What needs the job's own ranks (all-reduce within a host,
between two, over all; equal parameters; a first batch each) is checked when the job starts, under the watchdog.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.preflight.plan import GPUS
from trainer.process.options import add_run_arguments

if TYPE_CHECKING:
    from trainer.preflight.report import Result

EXAMPLES = """  python -m trainer preflight --config launch/configs/demo.yaml --world-size 2
  python -m trainer preflight --config launch/configs/china_128x256.yaml --world-size 400 --gpu h200 \\
      --script launch/slurm.sbatch"""
STYLES = {"pass": "green", "FAIL": "bold red", "skipped": "yellow"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument("--world-size", type=int, default=1, help="ranks of the job (default 1)")
    parser.add_argument("--gpu", choices=GPUS, help="what the ranks will run on")
    parser.add_argument("--script", type=Path, help="the batch script, whose numbers are compared")


def run(options: argparse.Namespace) -> int:
    from trainer.preflight.examine import examine
    from trainer.preflight.report import Subject
    from trainer.process import launch
    from trainer.process.failure import quieten

    try:
        quieten(0)
        results = examine(Subject(options, launch.join(10.0)))
    finally:
        launch.leave()
    show(results)
    failed = [r.check for r in results if r.state == "FAIL"]
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


def show(results: list[Result]) -> None:
    from rich.table import Column, Table

    from data.command_line import console

    table = Table("check", "", "s", Column("found", overflow="fold"), Column("remedy", overflow="fold"), title="preflight")
    for r in results:
        table.add_row(r.check, f"[{STYLES[r.state]}]{r.state}[/]", f"{r.seconds:.1f}", r.found, r.remedy)
    console(140).print(table)
