"""A deadline for every phase of a run, on every rank: nothing stands still for hours without saying where.

A thread watches the phase its rank is in. When one outlasts its deadline, every rank that still can writes the stacks of
all its threads to RUN_DIR/watchdog/, the lowest of them names the phase and the ranks that wrote nothing, and all exit.
Files need no network, and the only file touched before that is none.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from trainer.config import Watch

EXIT_HUNG = 70
GATHER_S = 4.0  # from the first report to the verdict: others look for it once a second
TICK_S = 1.0
SUSPENDED_S = 5.0  # a tick that is so late: the process stood still, as a suspended job does
BACKSTOP_S = 30.0  # after a deadline, stacks are shown, also where no thread enters the interpreter


class Watchdog:
    """Watches this process from `with` to its end; `enter` says which phase comes next."""

    def __init__(self, run_dir: Path, rank: int, size: int, limits: Watch) -> None:
        self.folder, self.rank, self.size, self.limits = run_dir / "watchdog", rank, size, limits
        self._now = ("", time.monotonic(), time.time())  # phase, when it began by either clock; one tuple, set at once
        self._suspended = 0.0  # seconds in all, which count for no deadline
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()

    def enter(self, phase: str) -> None:
        """The phase from now on: a field of `config.Watch`."""
        self._now = (phase, time.monotonic() - self._suspended, time.time())
        faulthandler.dump_traceback_later(getattr(self.limits, phase) + BACKSTOP_S)

    def _watch(self) -> None:
        ticked = time.monotonic()
        while not self._done.wait(TICK_S):
            late = time.monotonic() - ticked - TICK_S
            ticked = time.monotonic()
            if late > SUSPENDED_S:
                self._suspended += late
            phase, since, entered_at = self._now
            if not phase:
                continue
            waited, deadline = ticked - self._suspended - since, getattr(self.limits, phase)
            # Looking for others' reports only when it is late keeps the shared file system out of normal steps.
            if waited > deadline or (waited > deadline / 2 and self._reported(entered_at)):
                try:
                    self._give_up(phase, waited, entered_at)
                finally:  # the main thread is stuck and cannot unwind; the disk may be what has failed
                    os._exit(EXIT_HUNG)

    def _reported(self, entered_at: float) -> set[int]:
        """Ranks that have reported since this rank entered its phase."""
        found = self.folder.glob("rank-*.txt")
        return {int(path.stem.removeprefix("rank-")) for path in found if path.stat().st_mtime > entered_at - 1.0}

    def _give_up(self, phase: str, waited: float, entered_at: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        own = self.folder / f"rank-{self.rank}.txt"
        with own.open("w") as file:
            file.write(f"rank {self.rank}, process {os.getpid()}: {waited:.0f} s in phase '{phase}'\n")
            file.flush()
            faulthandler.dump_traceback(file)
        time.sleep(GATHER_S)
        present = self._reported(entered_at) | {self.rank}
        if self.rank == min(present):
            silent = sorted(set(range(self.size)) - present)
            who = f"silent: rank {', '.join(map(str, silent))}" if silent else "all ranks answered: they wait for one another"
            verdict = (
                f"watchdog: phase '{phase}' outlasted watch.{phase} = {getattr(self.limits, phase):g} s; {who}. Stacks of the "
                f"others are in {self.folder}. Look at the host of a silent rank, then start again: the run resumes."
            )
            (self.folder / "report.txt").write_text(verdict + "\n")
            with suppress(OSError, ValueError):  # a terminal that has gone
                print(f"[rank {self.rank}] {verdict}", file=sys.stderr, flush=True)
        else:
            time.sleep(1.0)  # the first exit makes launchers kill the rest
