"""`python -m trainer COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from trainer import evaluate, forecast, gate, plan, plots, preflight, status, train, weights

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train.main,
    "evaluate": evaluate.main,
    "compare": evaluate.compare_main,
    "forecast": forecast.main,
    "plot": plots.main,
    "import": weights.import_main,
    "checkpoint": weights.checkpoint_main,
    "which-cache": gate.main,
    "preflight": preflight.main,
    "plan": plan.main,
    "status": status.main,
}

SUMMARY = {
    "train": "train, or continue a run (usually started by `deepspeed trainer/train.py`)",
    "evaluate": "score a checkpoint: RMSE, MAE, bias and skill for every pollutant and lead time",
    "compare": "set evaluations beside each other, if they are of the same data, scan and samples",
    "forecast": "write the forecast from one analysis as a CF NetCDF file",
    "plot": "draw loss curves, and truth / forecast / difference maps of a case",
    "import": "convert foreign weights, completely or not at all",
    "checkpoint": "list, verify, show or export checkpoints",
    "which-cache": "name the wind-scan cache that reproduces a checkpoint's recorded loss",
    "preflight": "check everything that can be known before a job is queued",
    "plan": "days, GPU-hours, memory, storage and network that a run will need",
    "status": "how a run is doing, from its files alone",
}


def main(argv: list[str]) -> int:
    listing = "\n".join(f"  {name:11s} {text}" for name, text in SUMMARY.items())
    parser = argparse.ArgumentParser(
        prog="python -m trainer", description="Train, score and draw air-quality forecasters.",
        epilog=f"commands:\n{listing}\n\nexample:\n  python -m trainer evaluate runs/demo\n\n"
        "`python -m trainer COMMAND --help` has the options and an example of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    return COMMANDS[options.command](options.arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
