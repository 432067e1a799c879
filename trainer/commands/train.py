"""Train TopoFlow under DeepSpeed, as one rank of a launcher or alone. Started again, it continues."""

from __future__ import annotations

import argparse

from trainer.process.options import EXAMPLES as EXAMPLES
from trainer.process.options import add_arguments as add_arguments
from trainer.process.rank import Job, run_rank

REPORTS_ITS_ERRORS = True  # as a rank of many does


def run(options: argparse.Namespace) -> int:
    def train(job: Job) -> bool:
        from trainer.train import train as loop

        return loop(job)

    return run_rank(options, train)
