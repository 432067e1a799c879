"""When a run's checkpoints become visible, and which of them stay."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch.distributed as dist

from trainer.checkpoint import same_run, saving, state, store
from trainer.checkpoint.manifest import CheckpointError, Memory
from trainer.run.course import Course
from trainer.run.telemetry import Telemetry

log = logging.getLogger("trainer")


class Saver:
    """The checkpoints of a run: at most one is being written, by threads of all ranks, while training goes on."""

    def __init__(self, engine: Any, course: Course, present: Memory, telemetry: Telemetry) -> None:
        """
        Args:
            present: what is remembered of the run beside its progress.
        """
        self._engine, self._course, self._present, self._telemetry = engine, course, present, telemetry
        self._pending: saving.Saving | None = None

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing."""
        return self._pending is not None and self._pending.writing

    def save(self) -> None:
        """Copy what a checkpoint holds and start writing it, after the one before is visible; collective."""
        self.commit()
        started = time.monotonic()
        memory = self._present.model_copy(update={"progress": self._course.remembered()})
        self._pending = saving.Saving(self._course.run.run_dir, memory, state.capture(self._engine))
        self._pending.stall = time.monotonic() - started

    def commit(self) -> None:
        """Wait for all ranks, make a pending checkpoint visible, and remove old ones; collective.

        Raises:
            CheckpointError: on every rank, if any rank could not write.
        """
        if self._pending is None:
            return
        pending, self._pending, started = self._pending, None, time.monotonic()
        path = pending.commit()
        if dist.get_rank() == 0:
            self._settle(pending.step)
        seconds = pending.stall + time.monotonic() - started
        self._telemetry.record("checkpoint", pending.step, {"stall_s": seconds, "write_s": pending.write_seconds})
        log.info("saved %s: training waited %.2f s, written in %.2f s", path, seconds, pending.write_seconds)

    def _settle(self, step: int) -> None:
        run_dir, keep = self._course.run.run_dir, self._course.run.checkpoint
        try:
            same_run.remember(run_dir, self._present.run, step)
            store.retain(run_dir, keep.keep_last, keep.keep_every, step)
        except (OSError, CheckpointError) as error:
            log.info("WARNING: old checkpoints were not removed (%s); the new one is whole, the next save tries again", error)
