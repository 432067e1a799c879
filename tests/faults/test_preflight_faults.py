"""Each fault that can be known before a job is queued is found by its own check, with a remedy."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT, ranks_of, run, tiny_config

Said = dict[str, list[list[str]]]


@pytest.fixture(scope="module")
def said(tiny_path: Path, tiny_scan: object, tmp_path_factory: pytest.TempPathFactory) -> Said:
    folder = tmp_path_factory.mktemp("preflight")
    config = tiny_config(folder, tiny_path)
    done = ranks_of(["tests/faults/preflight_driver.py", str(config), str(tiny_path), str(folder)], 0)
    assert done.returncode == 0, done.stderr[-4000:]
    result: Said = json.loads(done.stdout.splitlines()[-1])
    return result


def failures(said: Said, case: str) -> dict[str, tuple[str, str]]:
    return {check: (found, remedy) for check, state, found, remedy in said[case] if state == "FAIL"}


def test_a_healthy_run_passes_every_check(said: Said) -> None:
    assert [state for _, state, _, _ in said["healthy"]] == ["pass"] * 17, said["healthy"]


@pytest.mark.parametrize(
    ("case", "check", "found"),
    [
        ("misspelt key", "configuration", "did you mean 'optimizer.lr'"),
        ("batch", "configuration", "Nearest possible: batch.total="),
        ("launch script", "launch script", "50 x 8 ranks"),
        ("blocking launches", "environment", "CUDA_LAUNCH_BLOCKING=1"),
        ("absent store", "data", "no store at /nowhere.zarr"),
        ("damaged shards", "data", "is not what was written"),
        ("edited statistics", "data", "does not match its fingerprint"),
        ("statistics of other data", "statistics", "pm25: normalised mean"),
        ("absent cache", "data", "no wind-scan cache at /nowhere.wind_scan"),
        ("incomplete weights", "initial weights", "head"),
        ("lost embedding", "initialisation", "pos_embed is 0 everywhere"),
        ("deaf scan", "sensitivity", "wind scan changes nothing"),
        ("unexpected loss", "first loss", "expected 0.3557 +- 0.02"),
        ("NaN", "step", "the loss is nan"),
        ("clock", "clock", "-90 s from that of"),
        ("altering file system", "checkpoint", "is not what was written"),
        ("small disk", "space", "6 checkpoints need"),
        ("small GPU", "memory", "a small GPU has 0 GB"),
        ("unwritable run_dir", "run directory", "Not a directory"),
    ],
)
def test_a_fault_fails_its_check_and_says_what_to_do(said: Said, case: str, check: str, found: str) -> None:
    failed = failures(said, case)
    assert check in failed, said[case]
    assert found in failed[check][0]
    assert len(failed[check][1]) > 10


def test_f13_a_kernel_cache_shared_by_nodes_is_refused(said: Said) -> None:
    """MIOpen "no suitable algorithm", SQLite locked: the kernel cache of all nodes lay on one file system."""
    assert "MIOPEN_USER_DB_PATH" in failures(said, "shared kernel cache")["environment"][0]
    assert "MIOPEN_USER_DB_PATH=/tmp/" in (ROOT / "launch/env/lumi.sh").read_text()


def test_f15_settings_that_crash_large_jobs_are_refused(said: Said) -> None:
    """400 GPUs ended in a segmentation fault: NCCL_IB_DISABLE=1 and a network plugin of none."""
    assert "NCCL_IB_DISABLE=1" in failures(said, "no InfiniBand")["environment"][0]
    assert "NCCL_NET_PLUGIN=none" in failures(said, "no plugin")["environment"][0]


def test_f37_a_feature_that_cannot_act_is_refused_before_launch(said: Said) -> None:
    """4,300 GPU-hours went into a bias that changed nothing."""
    assert "elevation bias changes nothing" in failures(said, "dead bias")["sensitivity"][0]
    assert "less than 0.001) changes nothing" in failures(said, "faint bias")["sensitivity"][0]


def test_f38_one_command_answers_for_a_run_before_it_starts_and_one_while_it_runs() -> None:
    """There were 36 monitor scripts and 30 test scripts."""
    done = run([sys.executable, "-m", "trainer", "--help"])
    listed = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    assert "check everything that can be known before a job is queued" in listed["preflight"]
    assert "how a run is doing, from its files alone" in listed["status"]
