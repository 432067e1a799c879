"""Ranks from every launcher's environment; contradictions are errors."""

from __future__ import annotations

import pytest

from data.process.ranks import LaunchError, World, find_ranks


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 0, 1, "single process")),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, (5, 1, 8, "deepspeed")),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "x"}, (5, 1, 8, "torchrun")),
        ({"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "16"}, (9, 1, 16, "srun")),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (0, 0, 1, "single process")),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "PMIX_RANK": "0"}, (0, 0, 1, "single process")),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "PMI_RANK": "0", "PMI_SIZE": "1"}, (0, 0, 1, "single process")),
    ],
)
def test_ranks_are_found(environ: dict[str, str], expected: tuple[int, int, int, str]) -> None:
    assert find_ranks(environ) == World(*expected)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, r"not \['LOCAL_RANK'\]"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "not inside WORLD_SIZE=2"),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"},
            "4 separate trainings",
        ),
    ],
)
def test_contradictions_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        find_ranks(environ)
