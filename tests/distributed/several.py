"""Started by launching.train_several: runs one after another on the same ranks, which saves their start-up; may inject.

One JSON argument, a list of jobs: "arguments" of trainer/train.py, and optionally
  "spike_at": [[first, last), ...]  targets at these stream positions are 30 times as large
  "leave_out": [[first, last), ...]  these positions do not exist in the stream (what stepping over them must equal)
  "count_reads": FILE  is evicted from the page cache; bytes that each rank reads from storage on import are printed
  "fails": [NAME, ...]  of FAILING: raises an OSError on rank 0 (all of them at once where a run must survive)
  "refused": true  the run must be refused: every rank prints what it was told, and after how long
  "run_dir_of_rank": true  every rank has a run directory of its own, as on disks of the nodes
  "blind": true  rank 1 does not see the checkpoints that are there
  "of_rank_1": [KEY=VALUE, ...]  what its configuration says otherwise
  "kernel_of_rank_1": NAME  what rank 1 says that it computes the elevation bias with
  "without_check": true  resolve_deepspeed lets settings pass that it refuses
  "opened": true  every rank prints what it opened below the store, the wind scan and the checkpoints
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from data import Refusal
from data.process import locks
from data.process.ranks import find_ranks
from data.samples import SampleIndex
from data.stream import Stream
from trainer import train as training
from trainer.checkpoint import saving, store
from trainer.config_file import load
from trainer.process import launch, rank
from trainer.process.failure import quieten
from trainer.process.options import parse
from trainer.process.stop import SIGNALS
from trainer.process.watchdog import Watchdog
from trainer.run import description, start
from trainer.run.telemetry import Telemetry

FAILING: dict[str, tuple[Any, str]] = {
    "lock": (locks, "hold"),
    "import": (start, "fit"),
    "manifest": (store, "look"),
    "configuration": (description, "dump"),
    "telemetry": (Telemetry, "_open"),
    "begin a save": (saving.Saving, "_begin"),
    "commit": (saving, "write"),
    "retention": (store, "retain"),
    "link": (saving.os, "replace"),
}
opened: list[str] = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)


@contextmanager
def injected(job: dict[str, Any]) -> Iterator[None]:
    read, shuffled, begin, kernel = Stream._batch, SampleIndex.shuffled, start.begin, description.kernel_name
    resolve = training.resolve_deepspeed

    def spiked(self: Stream, plan: Any) -> Any:
        batch = read(self, plan)
        if any(first <= plan.position < last for first, last in job.get("spike_at", [])):
            batch.target *= 30.0
        return batch

    def shortened(self: SampleIndex, positions: Any) -> Any:
        for first, last in job.get("leave_out", []):
            positions = positions + (last - first) * (positions >= first)
        return shuffled(self, positions)

    def counted(*arguments: Any) -> Any:
        if "count_reads" not in job:
            return begin(*arguments)
        if dist.get_rank() == 0:
            descriptor = os.open(job["count_reads"], os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        dist.barrier()
        before = bytes_read()
        begun = begin(*arguments)
        print(f"rank {dist.get_rank()} read {bytes_read() - before} bytes", flush=True)
        return begun

    def other_kernel(*arguments: Any) -> str:
        own = kernel(*arguments)
        return str(job.get("kernel_of_rank_1", own)) if dist.get_rank() == 1 else own

    def unchecked(path: Path, run: Any, size: int) -> dict[str, Any]:
        settings = json.loads(Path(path).read_text())
        hidden = settings["zero_optimization"].pop("round_robin_gradients")
        bare = Path(path).with_suffix(f".{dist.get_rank()}.json")
        bare.write_text(json.dumps(settings))
        resolved = resolve(bare, run, size)
        resolved["zero_optimization"]["round_robin_gradients"] = hidden
        return resolved

    with ExitStack() as patches:
        for target, name, replacement in (
            (Stream, "_batch", spiked),
            (SampleIndex, "shuffled", shortened),
            (start, "begin", counted),
            (description, "kernel_name", other_kernel),
            (launch, "SEEN_WITHIN_S", 2.0),
        ):
            patches.enter_context(mock.patch.object(target, name, replacement))
        if job.get("without_check"):
            patches.enter_context(mock.patch.object(training, "resolve_deepspeed", unchecked))
        if job.get("blind") and dist.get_rank() == 1:
            patches.enter_context(mock.patch.object(store, "look", return_value=[]))
        for name in job.get("fails", []) if dist.get_rank() == 0 else []:
            error = OSError(errno.ENOSPC, f"injected into {name}")
            patches.enter_context(mock.patch.object(*FAILING[name], side_effect=error))
        yield


def bytes_read() -> int:
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def run_job(job: dict[str, Any], world: launch.Joined) -> None:
    options = parse(job["arguments"])
    own = job.get("of_rank_1", []) if world.rank == 1 else []
    run = load(options.config, [*options.overrides, *own])
    if job.get("run_dir_of_rank"):
        run = run.model_copy(update={"run_dir": run.run_dir / str(world.rank)})
    began = time.monotonic()
    opened.clear()
    try:
        with injected(job), Watchdog(run.run_dir, world.rank, world.size, run.watch) as watchdog:
            rank.work(run, options, world, watchdog, training.train)
        said = "not refused"
    except Refusal as error:
        if not job.get("refused"):
            raise
        said = f"refused: {error}"
    locks.let_go()
    for number in SIGNALS:  # a run that has ended hears no more of them, the next one does
        signal.signal(number, signal.SIG_DFL)
    if job.get("refused"):
        line = {"rank": world.rank, "said": said, "seconds": time.monotonic() - began}
        print(f"JOB {json.dumps(line)}\n", end="", flush=True)
    if job.get("opened"):
        watched = [str(p) for p in (run.data.store, run.wind_scan.cache, run.run_dir / "checkpoints") if p]
        below = sorted({name for name in opened if any(name.startswith(place) for place in watched)})
        print(f"OPENED {json.dumps({'rank': world.rank, 'files': below})}\n", end="", flush=True)
    dist.barrier()


if __name__ == "__main__":
    quieten(find_ranks(os.environ).rank)
    joined = launch.join(2.0)
    for one in json.loads(sys.argv[1]):
        run_job(one, joined)
    launch.leave()
