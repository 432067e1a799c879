"""`python -m data COMMAND`: build, describe and check what is read."""

from __future__ import annotations

import sys

from data.command_line import Command, run_command

COMMANDS = {
    "synthesize": Command("data.commands.synthesize", "write a small physical reanalysis over real East Asian terrain"),
    "prepare": Command("data.commands.prepare", "turn the files of a reanalysis into a store: regridded, restartable"),
    "append": Command("data.commands.append", "add the later hours of new files to a store"),
    "wind-scan": Command("data.commands.scans.wind_scan", "compute the wind-scan cache of a store"),
    "wind-scan import-pickle": Command("data.commands.scans.import_pickle", "turn a wind cache of the old code into ours"),
    "wind-scan compare": Command("data.commands.scans.compare_scans", "count the orders in which two wind caches differ"),
    "wind-paths": Command("data.commands.wind_paths", "compute where the air of every patch comes from, to a cache"),
    "inspect": Command("data.commands.inspect", "print what a store holds"),
    "statistics": Command("data.commands.statistics", "measure a store over a training split that a run chooses itself"),
    "verify": Command("data.commands.verify", "check every shard of a store against its recorded hash"),
    "benchmark": Command("data.commands.benchmark", "measure how fast a store is read here"),
}


def main(argv: list[str]) -> int:
    return run_command("data", "Build, describe and check what is read.", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
