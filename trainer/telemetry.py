"""What a run shows of itself: a status line, always JSONL and TensorBoard, W&B if configured. Rank 0 only."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from trainer.config import ConfigError, Run

log = logging.getLogger("trainer")


class Telemetry:
    """Writes metrics of one run; a context manager, so that files are closed and the bar is removed on any exit.

    RUN/metrics.jsonl has one object a line: {"step", "time", "kind": "train" | "validation", metrics...}. On a
    terminal the status is a bar, elsewhere plain lines.
    """

    def __init__(self, run: Run, first_step: int) -> None:
        self.run, self.first_step, self.started = run, first_step, time.monotonic()
        run.run_dir.mkdir(parents=True, exist_ok=True)
        from torch.utils.tensorboard import SummaryWriter

        self._tensorboard = SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=first_step + 1)
        _drop_after(run.run_dir / "metrics.jsonl", first_step)
        self._jsonl = (run.run_dir / "metrics.jsonl").open("a", buffering=1)
        self._wandb = _start_wandb(run)
        self._progress: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=Console(stderr=True))
            self._task = self._progress.add_task("", total=run.steps, completed=first_step)

    def __enter__(self) -> Telemetry:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress:
            self._progress.stop()
        self._jsonl.close()
        self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def record(self, kind: str, step: int, metrics: dict[str, float]) -> None:
        """Write one row everywhere but on the console."""
        row = {"step": step, "time": round(time.time(), 3), "kind": kind, **metrics}
        self._jsonl.write(json.dumps(row) + "\n")
        for name, value in metrics.items():
            self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb:
            self._wandb.log({f"{kind}/{name}": value for name, value in metrics.items()}, step=step)

    def status(self, step: int, metrics: dict[str, float]) -> None:
        """Record a training row and show it as the status line with an ETA."""
        self.record("train", step, metrics)
        done = step - self.first_step
        remaining = (time.monotonic() - self.started) / max(1, done) * (self.run.steps - step)
        alpha = f"  alpha {metrics['elevation_alpha']:+.4f}" if "elevation_alpha" in metrics else ""
        line = (f"loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  {metrics['samples_per_s']:.1f} samples/s  "
                f"wait {100 * metrics['data_wait_share']:.1f} %{alpha}  ETA {_clock(remaining)}")  # fmt: skip
        if self._progress:
            self._progress.update(self._task, completed=step, description=line)
        else:
            log.info("step %d/%d  %s", step, self.run.steps, line)


def _drop_after(path: Path, step: int) -> None:
    """A resumed run repeats the steps after its checkpoint: their old rows go."""
    if path.exists():
        rows = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= step]
        path.write_text("".join(rows))


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _start_wandb(run: Run) -> Any:
    if run.telemetry.wandb_project is None:
        return None
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("telemetry.wandb_project is set but wandb is not installed: pip install wandb") from error
    return wandb.init(project=run.telemetry.wandb_project, dir=str(run.run_dir), config=run.model_dump(mode="json"))
