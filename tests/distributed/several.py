"""Started by launching.train_several: runs one after another on the same ranks, which saves their start-up; may inject.

One JSON argument, a list of jobs: "arguments" of trainer/train.py, and optionally
  "spike_at": [[first, last), ...]  targets at these stream positions are 30 times as large
  "leave_out": [[first, last), ...]  these positions do not exist in the stream (what stepping over them must equal)
  "count_reads": FILE  is evicted from the page cache; bytes that each rank reads from storage on import are printed
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from data.stream import SampleIndex, Stream
from trainer import runtime
from trainer import train as training
from trainer.config import load
from trainer.failing import quieten
from trainer.watchdog import Watchdog


@contextmanager
def injected(job: dict[str, Any]) -> Iterator[None]:
    read, shuffled, begin = Stream._batch, SampleIndex.shuffled, training.start.begin

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

    with (
        mock.patch.object(Stream, "_batch", spiked),
        mock.patch.object(SampleIndex, "shuffled", shortened),
        mock.patch.object(training.start, "begin", counted),
    ):
        yield


def bytes_read() -> int:
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


if __name__ == "__main__":
    quieten(runtime.find_ranks(os.environ)[0])
    world = runtime.join(2.0)
    for job in json.loads(sys.argv[1]):
        options = training.parse(job["arguments"])
        run = load(options.config, options.overrides)
        with injected(job), Watchdog(run.run_dir, world.rank, world.size, run.watch) as watchdog:
            training.train(run, options, world, watchdog)
    runtime.leave()
