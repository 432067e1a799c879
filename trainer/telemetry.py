"""What a run collects and shows of itself: a status line, always JSONL and TensorBoard, W&B if configured."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from data.batch import Batch
from trainer.config import ConfigError, Run
from trainer.engine import gradient_norm
from trainer.inputs import Inputs

log = logging.getLogger("trainer")


class Telemetry:
    """Writes metrics of one run, on rank 0; a context manager, so that files are closed and the bar is removed on any exit.

    RUN/metrics.jsonl has one object a line: {"step", "time", "kind": "train" | "validation", metrics...}. On a
    terminal the status is a bar, elsewhere plain lines.
    """

    def __init__(self, run: Run, first_step: int) -> None:
        self.run, self.first_step, self.started = run, first_step, time.monotonic()
        from torch.utils.tensorboard import SummaryWriter

        self._tensorboard = SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=first_step + 1)
        _drop_after(run.run_dir / "metrics.jsonl", first_step)
        self._jsonl = (run.run_dir / "metrics.jsonl").open("a", buffering=1)
        self._wandb = _start_wandb(run)
        self._file = _LogFile(run.run_dir / "train.log")
        self._silent = False  # after a row that could not be written
        log.addHandler(self._file)
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
        log.removeHandler(self._file)
        closing = [self._file.close, self._jsonl.close, self._tensorboard.close, *([self._wandb.finish] if self._wandb else [])]
        for close in closing:
            with self._spared():
                close()

    def record(self, kind: str, step: int, metrics: dict[str, float]) -> None:
        """Write one row everywhere but on the console."""
        row = {"step": step, "time": round(time.time(), 3), "kind": kind, **metrics}
        with self._spared():
            self._jsonl.write(json.dumps(row) + "\n")
        with self._spared():
            for name, value in metrics.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb:
            self._wandb.log({f"{kind}/{name}": value for name, value in metrics.items()}, step=step)

    def rewind(self, step: int) -> None:
        """After a roll-back: forget the rows behind `step`."""
        with self._spared():
            self._jsonl.close()
            _drop_after(self.run.run_dir / "metrics.jsonl", step)
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

    def status(self, step: int, metrics: dict[str, float]) -> None:
        """Record a training row and show it as the status line with an ETA."""
        self.record("train", step, metrics)
        done = step - self.first_step
        remaining = (time.monotonic() - self.started) / max(1, done) * (self.run.steps - step)
        alpha = f"  alpha {metrics['elevation_alpha']:+.4f}" if "elevation_alpha" in metrics else ""
        line = (f"loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  {metrics['samples_per_s']:.1f} samples/s  "
                f"MFU {100 * metrics['mfu']:.0f} %  wait {100 * metrics['data_wait_share']:.1f} %{alpha}  "
                f"ETA {clock(remaining)}")  # fmt: skip
        if self._progress:
            self._progress.update(self._task, completed=step, description=line)
            text = logging.LogRecord(log.name, logging.INFO, "", 0, f"step {step}/{self.run.steps}  {line}", None, None)
            self._file.emit(text)  # the terminal has the bar
        else:
            log.info("step %d/%d  %s", step, self.run.steps, line)


class _LogFile(logging.FileHandler):
    """A log file that is given up when it cannot be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        log.removeHandler(self)


@dataclass
class Window:
    """What happened since the last status line; read from the device once, in `summary`."""

    inputs: Inputs
    flops: int  # of a micro-batch, forward and backward
    matrix_rate: float  # of the device, measured, 1/s
    waited: float = 0.0
    forward: float = 0.0  # seconds of this rank's own, in which it waits for no other
    paused: float = 0.0  # validating and saving
    step_loss: float | None = None  # mean over ranks of the last step, where spikes are watched for
    spiked: bool = False  # whether that was above the limit
    kept: list[torch.Tensor] = field(default_factory=list)  # a micro-batch each: see `add`
    current: list[tuple[torch.Tensor, Batch]] = field(default_factory=list)  # of the step in progress
    started: float = field(default_factory=time.perf_counter)

    def add(self, losses: torch.Tensor, valid: torch.Tensor, missing: torch.Tensor, batch: Batch) -> None:
        """Note a micro-batch: its losses (T,), valid share of the target area (T,), missing share of the inputs ()."""
        self.current.append((torch.cat([losses, valid, missing[None]]), batch))

    def is_spike(self, limit: float) -> bool:
        """Whether the loss of the step in progress, over all its micro-batches and ranks, is above `limit`; collective."""
        targets = len(self.inputs.normalizer.targets)
        mean = torch.stack([values[:targets].mean() for values, _ in self.current]).mean()
        dist.all_reduce(mean)
        self.step_loss = float(mean) / dist.get_world_size()
        self.spiked = self.step_loss > limit
        return self.spiked

    def keep_step(self) -> None:
        self.kept += [values for values, _ in self.current]
        self.current = []

    def drop_step(self) -> list[dict[str, Any]]:
        """Forget the step in progress; its samples on this rank, and whether their micro-batch had a finite loss."""
        times, samples = self.inputs.store.times, []
        for values, batch in self.current:
            finite = bool(torch.isfinite(values).all())
            for hour, lead in zip(batch.hours, batch.lead_hours.tolist(), strict=True):
                samples.append({"time": str(times[hour]), "lead_hours": int(lead), "finite": finite})
        self.current = []
        return samples

    def summary(self, engine: Any, lr: float, total: int) -> dict[str, float]:
        """Means over the kept steps and all ranks; empties the window."""
        mean = torch.stack(self.kept).mean(0)
        dist.all_reduce(mean)
        names = self.inputs.normalizer.targets
        weighted, valid, missing = (mean / dist.get_world_size()).split([len(names), len(names), 1])
        losses = (weighted / valid).tolist()  # over valid cells, as validation counts
        seconds = time.perf_counter() - self.started - self.paused
        steps = len(self.kept) / engine.gradient_accumulation_steps()
        metrics = {"loss": sum(losses) / len(losses)} | {f"loss_{n}": x for n, x in zip(names, losses, strict=True)}
        metrics |= {
            "lr": lr, "grad_norm": gradient_norm(engine), "missing_inputs": float(missing),
            "samples_per_s": steps * total / seconds, "data_wait_share": self.waited / seconds,
            "mfu": len(self.kept) * self.flops / seconds / self.matrix_rate,
        }  # fmt: skip
        metrics |= slowest(self.waited + self.forward, mean.device)
        alpha = read_alpha(engine)
        if alpha is not None:
            metrics["elevation_alpha"] = alpha
        self.kept, self.waited, self.forward, self.paused, self.started = [], 0.0, 0.0, 0.0, time.perf_counter()
        return metrics


def slowest(seconds: float, device: torch.device) -> dict[str, float]:
    """The rank with the most seconds, and how many times the mean of all ranks that is; collective."""
    everyone = torch.zeros(dist.get_world_size(), device=device)
    everyone[dist.get_rank()] = seconds
    dist.all_reduce(everyone)
    return {"slowest_rank": int(everyone.argmax()), "slowest_over_mean": float(everyone.max() / everyone.mean())}


def measure_matrix_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Operations a second of a large matrix product on `device`: what MFU is measured against."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def once() -> float:
        started = time.perf_counter()
        for _ in range(4):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    return 4 * 2 * size**3 / min(once() for _ in range(3))


def read_alpha(engine: Any) -> float | None:
    """The learned elevation_alpha, from the fp32 masters; collective under ZeRO 3."""
    from deepspeed.utils import safe_get_full_fp32_param

    alpha = engine.module.blocks[0].attn.elevation_alpha
    if alpha is None:
        return None
    full = safe_get_full_fp32_param(alpha)
    return float(alpha if full is None else full)


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
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept))
    partial.replace(path)


def clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def require_wandb(run: Run) -> None:
    """
    Raises:
        ConfigError: a W&B project is asked for and the package is not there.
    """
    if run.telemetry.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("telemetry.wandb_project is set but wandb is not installed: pip install wandb")


def _start_wandb(run: Run) -> Any:
    if run.telemetry.wandb_project is None:
        return None
    import wandb

    settings = {"project": run.telemetry.wandb_project, "dir": str(run.run_dir), "config": run.model_dump(mode="json")}
    try:
        return wandb.init(**settings)
    except (wandb.errors.Error, OSError) as error:
        log.info("WARNING: W&B cannot be reached (%s): recording offline below %s, upload later with `wandb sync`",
                 error, run.run_dir)  # fmt: skip
        return wandb.init(**settings, mode="offline")
