"""What `trainer/train.py` and `python -m trainer train` are started with."""

from __future__ import annotations

import argparse
from pathlib import Path

DEEPSPEED_CONFIG = Path(__file__).parents[2] / "ds_configs" / "zero1.json"
DESCRIPTION = "Train TopoFlow under DeepSpeed. Started again, it continues."
EXAMPLES = """  deepspeed --num_gpus 2 trainer/train.py --config launch/configs/demo.yaml
  deepspeed --num_gpus 8 trainer/train.py --config launch/configs/china_128x256.yaml \\
      --deepspeed_config ds_configs/zero1.json batch.total=64 run_dir=runs/mine"""


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which run it is; preflight takes the same."""
    add = parser.add_argument
    add("--config", required=True, type=Path, help="YAML of the run, see launch/configs/")
    add("--deepspeed_config", type=Path, default=DEEPSPEED_CONFIG, help="DeepSpeed's JSON (default ds_configs/zero1.json)")
    changed = "accept that a resumed run differs in this key from its checkpoint; repeatable"
    add("--allow-change", action="append", default=[], metavar="KEY", help=changed)
    add("overrides", nargs="*", metavar="key=value", help="change the configuration, as in steps=600")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of a rank."""
    add_run_arguments(parser)
    add = parser.add_argument
    limit = "save and exit with code 75 after this long (under SLURM also before the job's end)"
    add("--time-limit", type=_minutes, metavar="MINUTES", help=limit)
    add("--world-size", type=int, metavar="N", help="refuse to start with another number of ranks")
    stopped = "create this after a stop by time limit or SIGUSR1; exit with 0 after any stop"
    add("--stopped-file", type=Path, metavar="FILE", help=stopped)
    add("--local_rank", type=int, help="given by the deepspeed launcher; the environment is used instead")


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0.0 < minutes < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no length of time in minutes")
    return minutes


def parse(argv: list[str]) -> argparse.Namespace:
    """Options of `trainer/train.py`."""
    parser = argparse.ArgumentParser(
        prog="trainer/train.py",
        description=DESCRIPTION,
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of refusals")
    return parser.parse_intermixed_args(argv)
