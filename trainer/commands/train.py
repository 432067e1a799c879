"""Train TopoFlow under DeepSpeed, as one rank of a launcher or alone. Started again, it continues."""

from __future__ import annotations

import argparse
import os

from trainer.config_file import load
from trainer.process.options import EXAMPLES as EXAMPLES
from trainer.process.options import add_arguments as add_arguments
from trainer.process.ranks import find_ranks


def run(options: argparse.Namespace) -> int:
    if find_ranks(os.environ)[2] == 1:  # what is wrong with it is said before torch is imported; by one rank of many
        load(options.config, options.overrides)

    from trainer.process.rank import run_rank
    from trainer.train import train

    return run_rank(options, train)
