"""What happened since the last status line: losses, waiting, speed, the slowest rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from data.batch import Batch
from trainer.checkpoint.zero import read_parameter
from trainer.dataset import Dataset
from trainer.engine import gradient_norm


@dataclass
class Window:
    """What happened since the last status line; read from the device once, in `summary`."""

    dataset: Dataset
    flops: int  # of a micro-batch, forward and backward
    matrix_rate: float  # of the device, measured, 1/s
    lr: float = 0.0  # of the last step
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
        targets = len(self.dataset.normalizer.targets)
        mean = torch.stack([values[:targets].mean() for values, _ in self.current]).mean()
        dist.all_reduce(mean)
        self.step_loss = float(mean) / dist.get_world_size()
        self.spiked = self.step_loss > limit
        return self.spiked

    def keep_step(self) -> float | None:
        """The step in progress was good; its loss, where spikes are watched for."""
        self.kept += [values for values, _ in self.current]
        self.current = []
        return self.step_loss

    def drop_step(self) -> list[dict[str, Any]]:
        """Forget the step in progress; its samples on this rank, and whether their micro-batch had a finite loss."""
        times, samples = self.dataset.store.times, []
        for values, batch in self.current:
            finite = bool(torch.isfinite(values).all())
            for hour, lead in zip(batch.hours, batch.lead_hours.tolist(), strict=True):
                samples.append({"time": str(times[hour]), "lead_hours": int(lead), "finite": finite})
        self.current = []
        return samples

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Validating and saving is not training: it does not count in rates."""
        began = time.monotonic()
        yield
        self.paused += time.monotonic() - began

    def summary(self, engine: Any, total: int) -> dict[str, float]:
        """Means over the kept steps and all ranks, and rates; empties the window; collective.

        Args:
            total: samples a step, of all ranks.
        """
        mean = torch.stack(self.kept).mean(0)
        dist.all_reduce(mean)
        names = self.dataset.normalizer.targets
        weighted, valid, missing = (mean / dist.get_world_size()).split([len(names), len(names), 1])
        known = valid > 0  # over valid cells of targets that have any, as validation counts
        means = zip(names, weighted / valid, known, strict=True)
        losses = {name: float(x) for name, x, there in means if there}
        metrics = {"loss": sum(losses.values()) / max(1, len(losses))}
        metrics |= {f"loss_{name}": x for name, x in losses.items()}
        metrics |= {"lr": self.lr, "grad_norm": gradient_norm(engine), "missing_inputs": float(missing)}
        seconds = time.perf_counter() - self.started - self.paused
        steps = len(self.kept) / engine.gradient_accumulation_steps()
        metrics["samples_per_s"] = steps * total / seconds
        metrics["data_wait_share"] = self.waited / seconds
        metrics["mfu"] = len(self.kept) * self.flops / seconds / self.matrix_rate
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


@lru_cache
def measure_matrix_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Operations a second of a large matrix product on `device`: what MFU is measured against."""
    size = size or (8192 if device.type == "cuda" else 512)  # a core is fastest where its cache holds them
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
    alpha = engine.module.blocks[0].attn.elevation_alpha
    return None if alpha is None else float(read_parameter(engine, alpha, None))
