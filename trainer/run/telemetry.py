"""What a run shows of itself: a status line, always JSONL and TensorBoard, W&B if configured."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from data.command_line import clock
from data.process.written import write_text
from trainer.checkpoint.consistency import on_main
from trainer.config import Run
from trainer.run.course import Course

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger("trainer")


class Telemetry:
    """Writes metrics of one run, on rank 0, and is silent on the others; a context manager, so that files are closed and the
    bar is removed on any exit.

    RUN/metrics.jsonl has one object a line: {"step", "time", "kind": "train" | "validation", metrics...}. On a
    terminal the status is a bar, elsewhere plain lines.
    """

    def __init__(self, run: Run, course: Course) -> None:
        self.run, self.course = run, course
        self.first_step, self.started = course.step, time.monotonic()
        self._speaks = not dist.is_initialized() or dist.get_rank() == 0
        self._silent = False  # after a row that could not be written
        self._bar: Progress | None = None

    def __enter__(self) -> Telemetry:
        """Open everything; collective, since the others must learn if it cannot be opened."""
        on_main(self._open)
        if self.first_step == 0:
            self.record("validation", 0, {"loss": self.course.progress.val_loss or 0.0})
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._speaks:
            return
        if self._bar:
            self._bar.stop()
        log.removeHandler(self._file)
        closing = [self._file.close, self._jsonl.close, self._tensorboard.close]
        if self._wandb:
            closing.append(self._wandb.finish)
        for close in closing:
            with self._spared():
                close()

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second of imports, on this rank only

        run, first_step = self.run, self.first_step
        self._tensorboard = SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=first_step + 1)
        _drop_after(run.run_dir / "metrics.jsonl", first_step)
        self._jsonl = (run.run_dir / "metrics.jsonl").open("a", buffering=1)
        self._wandb = _start_wandb(run)
        self._file = _LogFile(run.run_dir / "train.log")
        log.addHandler(self._file)
        if sys.stderr.isatty():
            self._start_bar()

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task("", total=self.run.steps, completed=self.first_step)
        self._bar.start()

    def record(self, kind: str, step: int, metrics: dict[str, float]) -> None:
        """Write one row everywhere but on the console."""
        if not self._speaks:
            return
        row = {"step": step, "time": round(time.time(), 3), "kind": kind, **metrics}
        with self._spared():
            self._jsonl.write(json.dumps(row) + "\n")
        with self._spared():
            for name, value in metrics.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb:
            self._wandb.log({f"{kind}/{name}": value for name, value in metrics.items()}, step=step)

    def rewind(self) -> None:
        """After a roll-back: forget the rows behind the step that the run is at again."""
        if not self._speaks:
            return
        with self._spared():
            self._jsonl.close()
            _drop_after(self.run.run_dir / "metrics.jsonl", self.course.step)
            self._jsonl = (self.run.run_dir / "metrics.jsonl").open("a", buffering=1)

    @contextmanager
    def _spared(self) -> Iterator[None]:
        """A disk that is full costs rows, never the run."""
        try:
            yield
        except (OSError, ValueError) as error:  # a file that could not be opened again is a closed one
            if not self._silent:
                self._silent = True
                log.info("WARNING: metrics cannot be written to %s (%s): the run goes on without them", self.run.run_dir, error)

    def status(self, metrics: dict[str, float]) -> None:
        """Record a training row and show it as the status line with an ETA."""
        if not self._speaks:
            return
        step = self.course.step
        self.record("train", step, metrics)
        remaining = (time.monotonic() - self.started) / max(1, step - self.first_step) * (self.run.steps - step)
        parts = [
            f"loss {metrics['loss']:.4f}",
            f"lr {metrics['lr']:.2e}",
            f"{metrics['samples_per_s']:.1f} samples/s",
            f"MFU {100 * metrics['mfu']:.0f} %",
            f"wait {100 * metrics['data_wait_share']:.1f} %",
        ]
        if "elevation_alpha" in metrics:
            parts.append(f"alpha {metrics['elevation_alpha']:+.4f}")
        line = "  ".join([*parts, f"ETA {clock(remaining)}"])
        if self._bar:
            self._bar.update(self._task, completed=step, description=line)
            text = logging.LogRecord(log.name, logging.INFO, "", 0, f"step {step}/{self.run.steps}  {line}", None, None)
            self._file.emit(text)  # the terminal has the bar
        else:
            log.info("step %d/%d  %s", step, self.run.steps, line)


class _LogFile(logging.FileHandler):
    """A log file that is given up when it cannot be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        log.removeHandler(self)


def _drop_after(path: Path, step: int) -> None:
    """A resumed run repeats the steps after its checkpoint: their old rows go, and a row that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True) if step else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            log.info("WARNING: %s holds a broken row, which is dropped", path)
    write_text(path, "".join(kept))


def _start_wandb(run: Run) -> Any:
    if run.telemetry.wandb_project is None:
        return None
    import wandb

    settings = {"project": run.telemetry.wandb_project, "dir": str(run.run_dir), "config": run.model_dump(mode="json")}
    try:
        return wandb.init(**settings)
    except (wandb.errors.Error, OSError) as error:
        log.info(
            "WARNING: W&B cannot be reached (%s): recording offline below %s, upload later with `wandb sync`",
            error,
            run.run_dir,
        )
        return wandb.init(**settings, mode="offline")
