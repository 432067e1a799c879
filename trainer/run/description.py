"""What a run says of itself before its first step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from data.channels import surroundings
from trainer.checkpoint.consistency import on_main
from trainer.checkpoint.zero import shape_of
from trainer.config import Run
from trainer.config_file import dump
from trainer.dataset import Dataset
from trainer.engine import dtype_of
from trainer.model.elevation_bias import kernel_name
from trainer.process.launch import Joined, require_alike
from trainer.run.start import Start, of_another_directory

log = logging.getLogger("trainer")


def announce(dataset: Dataset, samples: int, world: Joined, engine: Any, begun: Start, config: Path) -> None:
    """Print the resolved configuration once, and keep it with the run; collective.

    Args:
        samples: in the training split.
        config: the file that the run was started with.
    """
    run = dataset.run
    kernel = kernel_of(run, world.device)
    require_alike({"kernel of the elevation bias": kernel}, world)  # or all wait for the slowest
    on_main(lambda: _keep(dataset))
    if not world.is_main:
        return
    if begun.checkpoint is not None:
        log.info("resumed from %s", begun.checkpoint)
    else:
        _say_that_it_is_new(run, config)
    parameters = sum(shape_of(p).numel() for p in engine.module.parameters())
    accumulation, batch, schedule = run.batch.accumulation(world.size), run.batch, run.schedule
    length = schedule.decay_steps or run.steps
    log.info("%s", dump(run))
    log.info(
        f"{world.size} rank(s) by {world.launcher} on {world.device.type}, ZeRO {engine.zero_optimization_stage()}, "
        f"{run.precision}; {parameters:,} parameters; {samples} training samples, {run.steps * batch.total / samples:.2f} "
        f"epochs; batch {batch.total} = {batch.micro} micro x {accumulation} accumulated x {world.size} ranks; elevation "
        f"bias by {kernel}"
    )
    log.info(
        f"learning rate: {run.optimizer.lr:.3g} after {schedule.warmup_steps} warm-up steps, cosine to "
        f"{run.optimizer.lr * schedule.final_lr:.3g} at step {length}, run ends at step {run.steps}"
    )


def kernel_of(run: Run, device: torch.device) -> str:
    """How the elevation bias is computed on a device."""
    arch = run.architecture()
    if arch.relative_position or arch.first_block_dropout or arch.bias_floor is not None:
        return "query chunks"
    if run.model.elevation_bias == "none":
        return "nothing (off)"
    return kernel_name(device.type, dtype_of(run), run.model.width // run.model.heads)


def _keep(dataset: Dataset) -> None:
    (dataset.run.run_dir / "config.yaml").write_text(dump(dataset.run))
    surroundings.keep(dataset.store, dataset.scan, dataset.run.run_dir / surroundings.FILE)


def _say_that_it_is_new(run: Run, config: Path) -> None:
    log.info("no checkpoint in %s: starting at step 0", run.run_dir)
    other = of_another_directory(run.run_dir, config)
    if other is not None:
        log.info(
            f"WARNING: {other} holds checkpoints of a run of the same name. To continue that one, stop this and start from "
            f"the directory that it was started from, or set run_dir={other}"
        )
