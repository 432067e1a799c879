"""A rank that stands still is named, with everyone's stacks, within its phase's deadline plus ten seconds."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.launching import arguments, ranks_of, start_ranks, tiny_config

LIMIT_S = 5.0
QUICK, SLOW = ["rendezvous", "step"], ["first_collective", "first_batch", "save"]


@pytest.mark.parametrize("phase", [*QUICK, *(pytest.param(phase, marks=pytest.mark.slow) for phase in SLOW)])
def test_f19_a_frozen_rank_is_named_in_every_phase(tiny_path: Path, tiny_scan: object, tmp_path: Path, phase: str) -> None:
    """128 GPUs stood still for six hours after "all processes registered", and nobody watched."""
    config = tiny_config(tmp_path, tiny_path, checkpoint={"every": 3})
    given = arguments(config, f"watch.{phase}={LIMIT_S}", "steps=6", "schedule.decay_steps=6", zero="1")
    started = start_ranks(["tests/distributed/frozen.py", phase, *given], 2)
    try:
        frozen_at = wait_until_stopped(started.pids[1])
        while started.alive(0):
            assert time.monotonic() < frozen_at + 60
            time.sleep(0.02)
        seconds = time.monotonic() - frozen_at
    finally:
        started.signal(signal.SIGKILL, rank=1)
    done = started.wait()
    assert done.returncode == 70, done.stderr
    assert seconds < LIMIT_S + 10.0, done.stderr
    assert f"phase '{phase}' outlasted watch.{phase} = 5 s; silent: rank 1." in done.stderr
    assert done.stderr.count("watchdog:") == 1
    report = (tmp_path / "run/watchdog/report.txt").read_text()
    assert "silent: rank 1." in report
    assert "Current thread" in (tmp_path / "run/watchdog/rank-0.txt").read_text()
    assert not (tmp_path / "run/watchdog/rank-1.txt").exists()


def wait_until_stopped(pid: int) -> float:
    """When the process had stopped itself, on the monotonic clock."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return time.monotonic()
        time.sleep(0.02)
    raise AssertionError(f"process {pid} never stopped itself")


def test_f20_the_evidence_is_kept_with_the_run_and_an_old_report_does_not_speak_for_a_rank(tmp_path: Path) -> None:
    """The hang was blamed on an innocent commit, because nothing had been kept."""
    (tmp_path / "watchdog").mkdir()
    (tmp_path / "watchdog/rank-1.txt").write_text("of the hang before this one")
    os.utime(tmp_path / "watchdog/rank-1.txt", (1.0, 1.0))
    code = (
        "import sys, time; from pathlib import Path\n"
        "from trainer.config import Watch; from trainer.process.watchdog import Watchdog\n"
        "with Watchdog(Path(sys.argv[1]), 0, 3, Watch(step=1.0)) as watchdog:\n"
        "    watchdog.enter('step'); where_it_hangs = time.sleep(60)\n"
    )
    done = ranks_of(["-c", code, str(tmp_path)], 0)
    assert done.returncode == 70
    assert "silent: rank 1, 2." in (tmp_path / "watchdog/report.txt").read_text()
    stacks = (tmp_path / "watchdog/rank-0.txt").read_text()
    assert "in phase 'step'" in stacks
    assert 'File "<string>", line 4' in stacks
