"""`python -m trainer COMMAND`."""

from __future__ import annotations

import sys

from data.command_line import EXIT_REFUSED, Command, open_streams, run_command
from data.process.ranks import LaunchError, world
from trainer.process.failure import quieten

COMMANDS = {
    "train": Command("trainer.commands.train", "train, or continue a run (usually `deepspeed trainer/train.py`)"),
    "evaluate": Command("trainer.commands.trained.evaluate", "score a checkpoint: errors and skill by pollutant and lead time"),
    "compare": Command("trainer.commands.trained.compare", "set evaluations of the same data and samples beside each other"),
    "forecast": Command("trainer.commands.trained.forecast", "write the forecast from one analysis as a CF NetCDF file"),
    "plot": Command("trainer.commands.trained.plot", "draw loss curves, and truth / forecast / difference maps of a case"),
    "report": Command("trainer.commands.trained.report", "one HTML page of an evaluated run, with all pictures"),
    "import": Command("trainer.commands.import_weights", "convert foreign weights, completely or not at all"),
    "checkpoint": Command("trainer.commands.checkpoint", "list, verify, show or export checkpoints"),
    "which-cache": Command("trainer.commands.which_cache", "name the wind-scan cache that reproduces a recorded loss"),
    "preflight": Command("trainer.preflight.command", "check everything that can be known before a job is queued"),
    "plan": Command("trainer.preflight.plan_command", "days, GPU-hours, memory, storage and network of a run"),
    "status": Command("trainer.commands.status", "how a run is doing, from its files alone"),
}


def main(argv: list[str]) -> int:
    """Run a command; of several processes of a launcher the first one talks."""
    open_streams()
    try:
        quieten(world().rank)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return run_command("trainer", "Train, score and draw air-quality forecasters.", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
