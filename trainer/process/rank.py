"""One rank, from its options to its exit code: everything that stands around the loop.

What can be refused without torch is refused before it is imported.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from data import Refusal
from data.command_line import open_streams
from data.process.ranks import require_size, world
from trainer.config import Run
from trainer.config_file import load, require_wandb
from trainer.process.failure import Failing, quieten
from trainer.process.watchdog import Watchdog

if TYPE_CHECKING:
    from trainer.process.launch import Joined
    from trainer.process.stop import StopVote

EXIT_STOPPED = 75  # stopped on request after saving; start again to continue
# Deadlines are the watchdog's, which names the silent ranks and knows when a job was suspended.
COLLECTIVES_MINUTES = 7 * 24 * 60.0


@dataclass(frozen=True)
class Job:
    """What a rank was started for, and what watches over it."""

    run: Run
    options: argparse.Namespace
    world: Joined
    watchdog: Watchdog
    stop: StopVote


Train = Callable[[Job], bool]


def run_rank(options: argparse.Namespace, train: Train) -> int:
    """Meet the other ranks, `train`, part.

    Returns:
        0 when the run is finished, EXIT_STOPPED when it was stopped on request (0 there, too, where
        another code would make whoever started it start it again). What is refused or fails ends
        the process inside (process/failure.py).
    """
    open_streams()
    rank = int(os.environ["RANK"]) if os.environ.get("RANK", "").isdecimal() else 0
    failing = Failing(rank, options.debug)
    try:
        mine = world()
        failing.rank = mine.rank
        quieten(mine.rank)
        run = prepare(options, mine.size)
        failing.keep_in(run.run_dir)

        from trainer.process import launch

        with Watchdog(run.run_dir, mine.rank, mine.size, run.watch) as watchdog:
            watchdog.enter("rendezvous")
            joined = launch.join(COLLECTIVES_MINUTES)
            watchdog.enter("first_collective")
            launch.try_collectives(joined)
            watchdog.enter("start")
            finished = work(run, options, joined, watchdog, train)
            watchdog.enter("first_collective")
            launch.leave()
    except Refusal as error:
        failing.refuse(error)
    # To who watches the file, and to an agent that restarts what fails, stopping is no failure.
    restarted = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    return 0 if finished or options.stopped_file or restarted else EXIT_STOPPED


def prepare(options: argparse.Namespace, size: int) -> Run:
    """Everything that can be refused before the ranks meet.

    Raises:
        ConfigError, LaunchError: the configuration, DeepSpeed's settings or the number of ranks are wrong.
    """
    require_size(size, options.world_size)
    run = load(options.config, options.overrides)
    require_wandb(run)

    from trainer.engine import resolve_deepspeed

    resolve_deepspeed(options.deepspeed_config, run, size)
    return run


def _settings(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """What must be the same on every rank; where a node has its copy of the store is its own."""
    tree = run.model_dump(mode="json")
    tree["data"]["cache_dir"] = run.data.cache_dir is not None  # copying is a collective
    tree["allow-change"] = options.allow_change
    tree["DeepSpeed configuration"] = options.deepspeed_config.read_text()
    return tree | {name: version(name) for name in ("torch", "deepspeed", "topoflow-trainer")}


def work(run: Run, options: argparse.Namespace, world: Joined, watchdog: Watchdog, train: Train) -> bool:
    """Hold the run directory, `train`, and let go; collective."""
    from trainer.process import launch
    from trainer.process.stop import StopVote, end_time

    stop = StopVote(run.run_dir, end_time(options.time_limit, os.environ))
    launch.require_shared(run.run_dir, world)
    launch.require_alike(_settings(run, options), world)
    claimed = launch.claim(run.run_dir, world)
    finished = train(Job(run, options, world, watchdog, stop))
    stop.finish()
    if claimed is not None:
        claimed.close()
        if options.stopped_file and stop.wants_to_continue and not finished:
            options.stopped_file.touch()
    return finished
