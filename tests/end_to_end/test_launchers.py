"""Every way to start a run ends in the same weights: deepspeed, torchrun, mpirun, two hosts over ssh, and SLURM.

The last two need root, network namespaces and the packages openssh-server, pdsh, slurm-wlm and munge (tests/rig).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import BIN, ROOT, arguments, environment, free_port, losses, run, tiny_config, train

STEPS = ("steps=12", "schedule.decay_steps=12", "checkpoint.every=4")
RIG = ROOT / "tests/rig"


@pytest.fixture(scope="module")
def config(tiny_path: Path, tiny_scan: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_config(tmp_path_factory.mktemp("launchers"), tiny_path)


@pytest.fixture(scope="module")
def truth(config: Path) -> dict[str, torch.Tensor]:
    """Final weights by the launcher that `make train` uses."""
    done = train(config, f"run_dir={config.parent}/truth", *STEPS, launcher="deepspeed")
    assert done.returncode == 0, done.stderr[-3000:]
    return final(config.parent / "truth")


def final(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints/step-00000012/weights.safetensors")


def assert_same(run_dir: Path, truth: dict[str, torch.Tensor]) -> None:
    ours = final(run_dir)
    for name, tensor in truth.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6 * float(tensor.abs().max()))


@pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.slow), "mpirun"])
def test_launchers_end_in_the_same_weights(config: Path, truth: dict[str, torch.Tensor], launcher: str) -> None:
    run_dir = config.parent / launcher
    given = arguments(config, f"run_dir={run_dir}", *STEPS, "--world-size", "2", zero="1")
    start = {"torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2"], "mpirun": ["mpirun", "-n", "2", sys.executable]}
    done = run([*start[launcher], "trainer/train.py", *given])
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"2 rank(s) by {launcher}" in done.stderr
    assert "all-reduce over all ranks: 2 ranks" in done.stderr
    assert_same(run_dir, truth)


def scores_of(out: Path) -> dict[str, Any]:
    """What ranks wrote together, without what names the process."""
    scores: dict[str, Any] = json.loads((out / "evaluation-test.json").read_text())["scores"]
    return scores


@pytest.fixture(scope="module")
def alone(config: Path, truth: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Scores of one process."""
    out = config.parent / "evaluated-alone"
    done = run([sys.executable, "-m", "trainer", "evaluate", str(config.parent / "truth"), "--out", str(out)])
    assert done.returncode == 0, done.stderr[-3000:]
    return scores_of(out)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "mpirun"])
def test_an_evaluation_is_shared_by_the_ranks_of_every_launcher(config: Path, alone: dict[str, Any], launcher: str) -> None:
    """Under some of them every process was rank 0, and all wrote the same files."""
    out = config.parent / f"evaluated-{launcher}"
    start = {
        "deepspeed": [
            "deepspeed",
            "--num_gpus",
            "2",
            "--master_port",
            str(free_port()),
            "--no_local_rank",
            "--module",
            "trainer",
        ],
        "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2", "-m", "trainer"],
        "mpirun": ["mpirun", "-n", "2", sys.executable, "-m", "trainer"],
    }
    done = run([*start[launcher], "evaluate", str(config.parent / "truth"), "--out", str(out)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote ") == 1
    assert scores_of(out) == alone


def test_another_number_of_ranks_than_asked_for_is_refused(config: Path) -> None:
    done = run([sys.executable, "trainer/train.py", *arguments(config, "--world-size", "400", zero="1")])
    assert done.returncode == 2
    assert "400 ranks were asked for and this is one of 1" in done.stderr


def wait_for(path: Path, text: str, count: int, process: subprocess.Popen[str] | None = None, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() or path.read_text().count(text) < count:
        assert time.monotonic() < deadline, f"{path} never had {count} x {text}"
        assert process is None or process.poll() is None, f"the run ended before {path} had {count} x {text}"
        time.sleep(0.05)


def ranks_of(run_dir: Path) -> list[int]:
    """Processes that train in `run_dir`."""
    found = run(["pgrep", "-f", f"trainer/train.py --local_rank=.*run_dir={run_dir} "]).stdout.split()
    return [int(pid) for pid in found]


@pytest.mark.slow
def test_a_killed_rank_is_restarted_by_local_sh(config: Path, truth: dict[str, torch.Tensor]) -> None:
    run_dir = config.parent / "restarted"
    command = ["launch/local.sh", "--max-restarts", "1", *arguments(config, f"run_dir={run_dir}", *STEPS, zero="1")[1:]]
    own = environment() | {"RANKS": "2", "MASTER_PORT": str(free_port())}
    process = subprocess.Popen(command, cwd=ROOT, env=own, stderr=subprocess.PIPE, text=True)
    wait_for(run_dir / "metrics.jsonl", '"checkpoint"', 1, process)
    os.kill(ranks_of(run_dir)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors[-3000:]
    assert "starting it again, 0 restarts left" in errors
    assert "resumed from" in errors
    assert_same(run_dir, truth)


@pytest.mark.slow
def test_a_killed_launcher_leaves_a_run_that_the_next_one_waits_for_or_continues(
    config: Path, truth: dict[str, torch.Tensor]
) -> None:
    """Orphaned ranks hold the run directory; when they are gone, the same command finishes the run."""
    run_dir = config.parent / "orphaned"
    given = arguments(config, f"run_dir={run_dir}", *STEPS[1:], "steps=3000", zero="1")
    start = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "trainer/train.py"]
    process = subprocess.Popen([*start, *given], cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(run_dir / "metrics.jsonl", '"checkpoint"', 1)
    ranks = ranks_of(run_dir)
    launcher = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    os.kill(launcher, signal.SIGKILL)
    process.wait(timeout=30)
    second = train(config, f"run_dir={run_dir}", *STEPS)
    assert second.returncode != 0
    assert f"is being trained by process {ranks[0]}" in second.stderr
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    newest = int(sorted((run_dir / "checkpoints").glob("step-*[0-9]"))[-1].name.removeprefix("step-"))
    third = train(config, f"run_dir={run_dir}", *STEPS[1:], f"steps={max(12, newest + 4)}")
    assert third.returncode == 0, third.stderr[-3000:]
    assert "resumed from" in third.stderr
    assert losses(run_dir)[:12] == losses(config.parent / "truth")


def on(host: str, *command: str, **more: str) -> list[str]:
    extra = ["env", *(f"{k}={v}" for k, v in more.items())] if more else []
    return [str(RIG / "two_hosts.sh"), "on", host, *extra, *command]


def missing_for_the_rig(*programs: str) -> str:
    where = os.environ["PATH"] + ":/usr/sbin"
    absent = [name for name in ("ip", "sshd", "pdsh", *programs) if not shutil.which(name, path=where)]
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    return f"needs {', '.join(absent)}" if absent else ""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """nodea and nodeb, two network namespaces with their own sshd; a directory for their files."""
    why_not = missing_for_the_rig()
    if why_not:
        pytest.skip(why_not)
    folder = tmp_path_factory.mktemp("rig")
    up = run([str(RIG / "two_hosts.sh"), "up", str(folder)])
    if up.returncode:
        run([str(RIG / "two_hosts.sh"), "down", str(folder)])
        pytest.skip(f"cannot make network namespaces here: {up.stderr.strip().splitlines()[-1]}")
    yield folder
    run([str(RIG / "two_hosts.sh"), "down", str(folder)])


NETWORK = {"GLOO_SOCKET_IFNAME": "eth0", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "10.77.0.1"}


@pytest.mark.slow
def test_two_hosts_over_ssh_end_in_the_same_weights_and_survive_a_broken_link(
    config: Path, truth: dict[str, torch.Tensor], hosts: Path
) -> None:
    (hosts / "hostfile").write_text("nodea slots=2\nnodeb slots=2\n")
    command = ["launch/hosts.sh", str(hosts / "hostfile")]
    run_dir = config.parent / "two-hosts"
    given = arguments(config, f"run_dir={run_dir}", *STEPS, zero="1")[1:]
    done = run(on("nodea", *command, *given, PATH=environment()["PATH"], **NETWORK))
    said = done.stderr + done.stdout
    assert done.returncode == 0, said[-3000:]
    assert "4 rank(s) by deepspeed" in said
    assert "all-reduce over the ranks of nodea: 2 ranks" in said
    assert "all-reduce over two hosts: 4 ranks" in said
    assert_same(run_dir, truth)

    broken = config.parent / "broken-link"
    endless = arguments(config, f"run_dir={broken}", *STEPS[1:], "steps=100000", "watch.step=10", zero="1")[1:]
    process = subprocess.Popen(
        on("nodea", *command, *endless, PATH=environment()["PATH"], **NETWORK),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    wait_for(broken / "metrics.jsonl", '"checkpoint"', 1)
    run(["ip", "-n", "nodea", "link", "set", "eth0", "down"])
    broke = time.monotonic()
    ended: dict[str, float] = {}
    while len(ended) < 2:
        for host in ("nodea", "nodeb"):
            alive = run(["bash", "-c", f"for p in $(ip netns pids {host}); do grep -l trainer/train.py /proc/$p/cmdline; done"])
            if "cmdline" not in alive.stdout:
                ended.setdefault(host, time.monotonic() - broke)
        assert time.monotonic() - broke < 90, f"still running after the link broke; ended: {ended}"
        time.sleep(1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run(["ip", "-n", "nodea", "link", "set", "eth0", "up"])
    again = train(config, f"run_dir={broken}", *STEPS[1:], f"steps={4 * (1 + len(losses(broken)) // 4)}")
    assert "resumed from" in again.stderr, again.stderr[-2000:]


@pytest.fixture
def slurm(hosts: Path) -> Iterator[dict[str, str]]:
    """A controller and two node daemons; the environment of its commands."""
    why_not = missing_for_the_rig("slurmctld", "slurmd", "sbatch", "munged")
    if why_not:
        pytest.skip(why_not)
    up = run([str(RIG / "slurm.sh"), "up", str(hosts / "slurm")], timeout=60)
    conf = {"SLURM_CONF": str(hosts / "slurm/slurm.conf")}
    deadline = time.monotonic() + 20
    while "idle" not in run(on("nodea", "timeout", "5", "sinfo", "-h", "-o", "%T", **conf)).stdout:
        if time.monotonic() > deadline:
            run([str(RIG / "slurm.sh"), "down", str(hosts / "slurm")])
            pytest.skip(f"SLURM does not start here: {up.stderr[-300:]}")
        time.sleep(0.5)
    yield conf
    run([str(RIG / "slurm.sh"), "down", str(hosts / "slurm")])


@pytest.mark.slow
def test_a_slurm_job_is_stopped_requeued_and_ends_in_the_same_weights(
    config: Path, truth: dict[str, torch.Tensor], hosts: Path, slurm: dict[str, str]
) -> None:
    """launch/slurm.sbatch as it is, with small numbers: signalled like a pre-emption, requeued by itself, finished."""
    run_dir = config.parent / "slurm"
    site = hosts / "site.sh"
    lines = [f"export {k}={v}" for k, v in NETWORK.items() if k != "MASTER_ADDR"]
    site.write_text("\n".join([f"export PATH={BIN}:$PATH", "export CPU_BIND=none", *lines]))
    folder = hosts / "submitted"
    folder.mkdir()
    (folder / "trainer").symlink_to(ROOT / "trainer")
    given = arguments(config, f"run_dir={run_dir}", *STEPS, zero="1")[1:]
    small = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=10"]
    submit = ["bash", "-c", f'cd {folder} && exec sbatch --parsable "$@"', "-", *small, str(ROOT / "launch/slurm.sbatch")]
    queued = run(on("nodea", *submit, given[0], str(site), *given[1:], **slurm), timeout=30)
    assert queued.returncode == 0, queued.stderr
    job = queued.stdout.strip()
    metrics = run_dir / "metrics.jsonl"
    wait_for(metrics, '"checkpoint"', 1)
    run(on("nodea", "timeout", "10", "scancel", "--signal=USR1", "--batch", job, **slurm))
    log = folder / f"topoflow-{job}.out"
    try:
        wait_for(log, "requeueing job", 1, seconds=60)
        wait_for(metrics, '"step": 12', 1, seconds=120)
        deadline = time.monotonic() + 60
        while not (run_dir / "checkpoints/step-00000012/manifest.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        run(on("nodea", "timeout", "10", "scancel", job, **slurm))
    said = (folder / f"topoflow-{job}-nodea.log").read_text()
    assert "2 rank(s) by srun" in said
    assert "stopped at step" in said
    assert "resumed from" in said
    assert (folder / f"topoflow-{job}-nodeb.log").exists()
    assert_same(run_dir, truth)
