"""The wish to stop: signals, a file, a time limit; heard at once on every rank, agreed on at a step boundary.

SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1 mean the same: finish the step, save, exit with code 75. A second one ends the
process at once, without saving. Launchers pass one key press on to their ranks more than once, so what arrives within
TWICE_S of the first counts as the first.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

log = logging.getLogger("trainer")
TIME_LIMIT = "the time limit"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
TWICE_S = 0.5


class StopVote:
    """Whether to stop, agreed on by all ranks.

    Votes travel beside the step: `cast` before it, `count` after it; so a stop takes effect at most one step later. They also
    say whether any rank is still writing a checkpoint.
    """

    def __init__(self, run_dir: Path, end_time: float | None) -> None:
        self.run_dir, self.end_time = run_dir, end_time
        self.reason = ""
        self.agreed = False  # all ranks know that at least one of them wants to stop
        self.anyone_writing = False
        self._done = False
        self._vote = torch.zeros(2)
        self._work: dist.Work | None = None
        self._group = dist.new_group(backend="gloo")
        self._listen()

    def cast(self, writing: bool) -> None:
        """Send this rank's vote; `writing` says that it is still writing a checkpoint."""
        self._look()
        self._vote.copy_(torch.tensor([bool(self.reason), writing]))
        self._work = dist.all_reduce(self._vote, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def count(self) -> None:
        """Wait for all votes."""
        assert self._work is not None
        self._work.wait()
        stop, writing = self._vote.tolist()
        self.agreed, self.anyone_writing = self.agreed or bool(stop), bool(writing)

    def agree_now(self) -> bool:
        """Whether any rank wants to stop, outside a step; collective."""
        self.cast(writing=False)
        self.count()
        return self.agreed

    def finish(self) -> None:
        """Everything is saved: launchers signal the other ranks once the first has ended, and they are just ending, too."""
        self._done = True
        for number in SIGNALS:  # while it ends, Python would give them back their default, which is to die of them
            signal.signal(number, signal.SIG_IGN)

    @property
    def why(self) -> str:
        return self.reason or "another rank was told to"

    @property
    def wants_to_continue(self) -> bool:
        """Whether the reason was one that a scheduler's next start follows, not a person or its cancelling."""
        return self.reason in ("", TIME_LIMIT, signal.SIGUSR1.name)

    def _look(self) -> None:
        if not self.reason and dist.get_rank() == 0 and (self.run_dir / "STOP").exists():
            self.reason = f"file {self.run_dir / 'STOP'}"
            (self.run_dir / "STOP").unlink(missing_ok=True)  # or the next start would stop as well
        if not self.reason and self.end_time is not None and time.time() > self.end_time:
            self.reason = TIME_LIMIT

    def _listen(self) -> None:
        """Let a thread hear signals: Python itself would wait until the main thread has left its collective."""
        heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # of nohup, or of a shell's background job
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self._hear, args=(heard,), name="signals", daemon=True).start()

    def _hear(self, heard: int) -> None:
        first: float | None = None
        while True:
            number = os.read(heard, 1)[0]
            if self._done or number not in SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
                self.reason = signal.Signals(number).name
            elif time.monotonic() - first > TWICE_S:
                told = f"{signal.Signals(number).name} again: ending at once, without saving"
                with suppress(OSError, ValueError):  # a terminal that has gone
                    print(told, file=sys.stderr, flush=True)
                os._exit(128 + number)


def end_time(limit_minutes: float | None, environ: Mapping[str, str], reserve_s: float = 120.0) -> float | None:
    """When to stop, in seconds since the epoch: the limit given, or the scheduler's end less time to save.

    An end that is no time, or has passed, is that of another job, in whose shell this one was
    started: it is named, not obeyed.
    """
    ends = [] if limit_minutes is None else [time.time() + 60.0 * limit_minutes]
    stated = environ.get("SLURM_JOB_END_TIME")
    if stated is not None:
        try:
            end = float(stated)
        except ValueError:
            end = math.nan
        if end > time.time():
            ends.append(end - reserve_s)
        else:
            told = "is no time to come, and is not obeyed: unset it, or use --time-limit"
            log.info("WARNING: SLURM_JOB_END_TIME=%s %s", stated, told)
    return min(ends, default=None)
