"""How a rank fails: its error is logged first, then the process ends, at once; nothing waits for a broken collective.

Everything goes to RUN/errors/rank-R.log. The console ends with the error itself, once: said by the rank that it happened
on, or by rank 0 where all ranks raised it; ranks that only lost the connection to it are silent.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from data import Refusal
from data.command_line import EXIT_REFUSED
from data.process import locks

log = logging.getLogger("trainer")
EXIT_FAILED = 1
HEARD_WITHIN_S = 3.0  # until the error of another rank is in its log
SUMMARY = "TOPOFLOW_ERROR_FILE"  # where a launch script wants the one error that ended the run
BROKEN = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "remote process exited",
    "NCCL communicator was aborted",
    "connection was closed",
    "Timed out waiting",
    "Connection refused",
)


def quieten(rank: int) -> None:
    """Only rank 0 talks; the others keep their errors, tagged with their rank."""
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR,
        stream=sys.stderr,
        format="%(message)s" if rank == 0 else f"[rank {rank}] %(message)s",
    )


class Failing:
    """Reports what ends this rank; made before the world is joined, and told the run directory once it is known."""

    def __init__(self, rank: int, debug: bool) -> None:
        self.rank, self.debug = rank, debug
        self.folder: Path | None = None
        self._since = time.time()
        sys.excepthook = self._unexpected

    def keep_in(self, run_dir: Path) -> None:
        """From now on errors are also in RUN_DIR/errors/rank-R.log; a directory that cannot be made is a refusal later."""
        self.folder = run_dir / "errors"

    def refuse(self, error: Exception) -> None:
        """End with code 2, one screen and no traceback: something that was given is wrong."""
        try:
            self._tell(f"error: {error}", error)
        finally:
            _end(EXIT_REFUSED)

    def _unexpected(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            _end(130)
        try:
            self._tell(f"error: {kind.__name__}: {error}", error)
        finally:
            _end(EXIT_FAILED)

    def _tell(self, text: str, error: BaseException) -> None:
        kept = self._keep(text, error)
        if self.debug or (kept is None and not isinstance(error, Refusal)):
            traceback.print_exception(error)
        broken = not isinstance(error, Refusal) and any(sign in str(error) for sign in BROKEN)
        first_line = text.splitlines()[0]
        if self.rank == 0 and not broken:
            self._say(text + ("" if isinstance(error, Refusal) or self.debug else f"\n(traceback in {kept})"))
            return
        others = self._errors_of_others(until_seen=None if broken else first_line)
        if self.rank == 0:
            cause = next((f"rank {rank} failed: {said}" for rank, said in others.items()), first_line)
            self._say(f"error: ended because {cause}\n(details in {self.folder})")
        elif not broken and first_line not in others.values():
            self._say(first_line if isinstance(error, Refusal) else f"{first_line}\n(traceback in {kept})")

    def _say(self, text: str) -> None:
        log.error("%s", text)
        if SUMMARY in os.environ:
            with suppress(OSError):
                Path(os.environ[SUMMARY]).write_text(text if self.rank == 0 else f"[rank {self.rank}] {text}")

    def _keep(self, text: str, error: BaseException) -> Path | None:
        _tell_torchrun(text)
        if self.folder is None:
            return None
        path = self.folder / f"rank-{self.rank}.log"
        try:
            self.folder.mkdir(exist_ok=True)  # never a run directory that was moved while it ran
            with path.open("a") as file:
                trace = "" if isinstance(error, Refusal) else "".join(traceback.format_exception(error))
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n{trace}")
        except OSError:  # the disk may be what has failed: the console still has the error
            return None
        return path

    def _errors_of_others(self, until_seen: str | None) -> dict[int, str]:
        """Rank -> first line of the error it has just logged; waits for any, or for one line."""
        deadline = time.monotonic() + HEARD_WITHIN_S
        while True:
            found = {}
            for path in sorted(self.folder.glob("rank-[0-9]*.log")) if self.folder else []:
                rank = int(path.stem.removeprefix("rank-"))
                if rank != self.rank and path.stat().st_mtime > self._since - 1.0:
                    lines = [line[20:] for line in path.read_text(errors="replace").splitlines() if line[20:26] == "error:"]
                    if lines and not any(sign in lines[-1] for sign in BROKEN):
                        found[rank] = lines[-1]
            if (found if until_seen is None else until_seen in found.values()) or time.monotonic() > deadline:
                return found
            time.sleep(0.1)


def _tell_torchrun(text: str) -> None:
    """It shows the error in the summary that it ends with, where it finds it in this file (torch.distributed.elastic)."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        about = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with suppress(OSError):  # the disk may be what has failed
            Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": about}}))


def _end(code: int) -> None:
    try:
        locks.let_go()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # also where the terminal has gone
        os._exit(code)
