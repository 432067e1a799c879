"""Ranks from every launcher's environment; contradictions are errors."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import pytest

from trainer.runtime import LaunchError, _lock, find_ranks


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 0, 1, "single process")),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, (5, 1, 8, "deepspeed")),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "x"}, (5, 1, 8, "torchrun")),
        ({"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16"}, (9, 1, 16, "srun")),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}, (0, 0, 1, "single process")),
    ],
)
def test_ranks_are_found(environ: dict[str, str], expected: tuple[int, int, int, str]) -> None:
    assert find_ranks(environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, r"not \['LOCAL_RANK'\]"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "not inside WORLD_SIZE=2"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, "4 separate trainings"),
    ],
)
def test_contradictions_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        find_ranks(environ)


@pytest.mark.parametrize(("seconds", "locked"), [(0.2, True), (60.0, False)])
def test_a_glance_at_the_lock_of_a_run_does_not_keep_it_from_starting(tmp_path: Path, seconds: float, locked: bool) -> None:
    """`status` holds a shared lock for a moment; another trainer holds it for good."""
    with (tmp_path / "lock").open("w") as glance, (tmp_path / "lock").open("a+") as ours:
        fcntl.flock(glance, fcntl.LOCK_SH)
        timer = threading.Timer(seconds, fcntl.flock, (glance, fcntl.LOCK_UN))
        timer.start()
        assert _lock(ours, patience_s=1.0) == locked
        timer.cancel()
