"""A run that did not know whose directory it was in, who else was there, or when to stop."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data import DataError
from data.process import locks
from data.process.ranks import LaunchError, find_ranks
from data.splits import hours_of
from data.store.layout import Store
from data.wind_scan.cache import ScanCache
from tests.faults.test_checkpoint_faults import make, present
from tests.faults.test_silent_faults import told
from tests.launching import (
    BIN,
    ROOT,
    Started,
    arguments,
    environment,
    losses,
    manifest,
    ranks_of,
    start_ranks,
    tiny_config,
    train,
    train_several,
)
from trainer.checkpoint import loading, same_run, store
from trainer.checkpoint.manifest import Begun, CheckpointError, Manifest, Unreadable, write
from trainer.checkpoint.record import write_tensors
from trainer.config_file import load
from trainer.forecaster import load_forecaster
from trainer.process.stop import end_time
from trainer.run.start import look_back
from trainer.scores.comparison import other_identity
from trainer.scores.errors import ErrorSums, normalised_loss
from trainer.verification.summary import _cases


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, tiny_scan: ScanCache) -> Path:
    return tiny_config(tmp_path_factory.mktemp("history"), tiny_path)


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    """A run of 6 steps that has saved steps 3 and 6."""
    done = train(config, f"run_dir={config.parent}/trained", "steps=6", "checkpoint.every=3", ranks=1)
    assert done.returncode == 0, done.stderr[-2000:]
    return config.parent / "trained"


def again(config: Path, run: Path, *overrides: str) -> str:
    """What is said when the run is started once more."""
    done = train(config, f"run_dir={run}", *overrides, ranks=1)
    assert "Traceback" not in done.stderr
    return f"{done.returncode} {done.stderr}"


@pytest.mark.parametrize("how", ["dangling", "empty", "absent", "of before runs had names"])
def test_f74_a_history_without_its_checkpoints_is_never_begun_anew(
    config: Path, trained: Path, tmp_path: Path, how: str
) -> None:
    """A scratch file system that was not mounted: started at step 0, and emptied the metrics."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    if how == "of before runs had names":
        (run / "run.json").unlink()
    shutil.rmtree(run / "checkpoints")
    if how == "dangling":
        (run / "checkpoints").symlink_to(tmp_path / "unmounted")
    elif how == "empty":
        (run / "checkpoints").mkdir()
    before = (run / "metrics.jsonl").read_text()
    said = again(config, run, "steps=9")
    assert said.startswith("2 ")
    assert ("not there now" if how == "dangling" else "has saved step 6, and no checkpoint is there") in said
    assert (run / "metrics.jsonl").read_text() == before


def test_f74_a_branch_that_was_stepped_over_stays_so_when_it_comes_back(config: Path, trained: Path, tmp_path: Path) -> None:
    """A checkpoint was out of reach for a day; when it came back, the newer branch was abandoned for it."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    six = run / "checkpoints/step-00000006"
    six.rename(tmp_path / "away")
    assert "was that of step 6, and is not there: it goes on from step 3" in again(config, run, "steps=5")
    (tmp_path / "away").rename(six)
    said = again(config, run, "steps=7")
    assert "step-00000006 is not continued, and is called step-00000006.aside-" in said
    assert f"resumed from {run}/checkpoints/step-00000005" in said
    assert [found.step for found in store.look(run)] == [3, 5, 7]
    starts = manifest(run / "checkpoints/step-00000007")["starts"]
    assert [start["step"] for start in starts] == [0, 3, 5]


def test_f74_retention_leaves_a_branch_alone_that_comes_back_while_it_runs(tmp_path: Path) -> None:
    """The newer branch's retention would have removed what was put there again."""
    first, second = Begun(id="a", step=0), Begun(id="b", step=3)
    for step, starts in ((3, [first]), (6, [first]), (4, [first, second]), (5, [first, second])):
        folder = make(tmp_path, step, None)
        content = store.manifest(folder)
        content.starts = starts
        write(content, folder / "manifest.json")
    assert [found.step for found in store.look(tmp_path)] == [3, 6, 4, 5]
    store.retain(tmp_path, keep_last=1, keep_every=None, newest_step=5)
    assert [found.step for found in store.look(tmp_path)] == [6, 5]


def test_f74_a_copy_of_a_run_is_a_run_of_its_own(config: Path, trained: Path, tmp_path: Path) -> None:
    """The configuration in a copy named the original, which it then trained on."""
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    assert load(copy / "config.yaml").run_dir == copy
    assert load(copy / "config.yaml", ["run_dir=/elsewhere"]).run_dir == Path("/elsewhere")
    with locks.hold(trained / "lock"):
        shutil.copy(trained / "lock", copy / "lock")
        assert locks.holder(trained / "lock") is not None
        assert locks.holder(copy / "lock") is None
        assert again(copy / "config.yaml", copy, "steps=7").startswith("0 ")
    shutil.rmtree(copy / "checkpoints")
    other = tmp_path / "other"
    assert train(config, f"run_dir={other}", "steps=2", "schedule.warmup_steps=0", ranks=1).returncode == 0
    (copy / "checkpoints").symlink_to(other / "checkpoints")
    with pytest.raises(CheckpointError, match="are of another run"):
        same_run.require_own(copy, store.manifest(store.newest(copy) or copy))


def wait_for(started: Started, path: Path) -> None:
    while not path.exists():
        assert started.alive(), started.err.read_text()
        time.sleep(0.02)


def test_f74_a_run_whose_directory_is_renamed_ends_and_writes_nowhere_else(config: Path, tmp_path: Path) -> None:
    """Metrics went on in the renamed directory, checkpoints into a new one of the old name, exit 0."""
    old, new = tmp_path / "old", tmp_path / "new"
    given = arguments(config, f"run_dir={old}", "steps=4000", "checkpoint.every=10", zero="1")
    started = start_ranks(["trainer/train.py", *given], 2)
    wait_for(started, old / "checkpoints/latest")
    old.rename(new)
    done = started.wait()
    assert done.returncode not in (0, 75)
    assert not old.exists()
    assert "no longer that of process" in done.stderr
    assert loading.newest(new) is not None


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_f75_files_of_a_checkpoint_have_the_modes_that_the_umask_asks_for(tmp_path: Path, umask: int) -> None:
    """0600 whatever the umask: a colleague's resume said "every checkpoint is damaged, start anew"."""
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "w.safetensors", {"w": torch.ones(3)})
    finally:
        os.umask(before)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("which", ["manifest.json", "weights.safetensors"])
def test_f75_what_cannot_be_read_now_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, which: str
) -> None:
    """A file without the right to read it, or of a server that is away, was stepped over as damaged."""
    for step in (3, 6):
        make(tmp_path, step, None)
    newest = tmp_path / "checkpoints/step-00000006" / which
    opened = Path.open

    def refuse(self: Path, *arguments: Any, **keywords: Any) -> Any:
        if self == newest:
            raise OSError(code, os.strerror(code))
        return opened(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(Unreadable, match="cannot be read now") as refused:
        loading.newest(tmp_path, step_over=True)
    assert "damaged" not in str(refused.value)
    store.retain(tmp_path, keep_last=1, keep_every=None)
    assert (tmp_path / "checkpoints/step-00000006").exists()


SUSPENDED = """
import sys, time
from pathlib import Path
from trainer.checkpoint.record import write_tensors
from trainer.config import Watch
from trainer.process.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), 0, 1, Watch(step=8.0)) as watchdog:
    watchdog.enter("step")
    print("ready", flush=True)
    for _ in range(70):
        time.sleep(0.1)
print("lived")
"""


def test_f76_time_in_which_a_job_was_suspended_counts_for_no_deadline(tmp_path: Path) -> None:
    """A job that the scheduler had suspended for an hour was killed when it woke."""
    started = start_ranks(["-c", SUSPENDED, str(tmp_path)], 0)
    while "ready" not in started.out.read_text():
        time.sleep(0.02)
    started.signal(signal.SIGSTOP)
    time.sleep(9.0)
    started.signal(signal.SIGCONT)
    done = started.wait(30)
    assert done.returncode == 0, done.stderr
    assert "lived" in done.stdout


def test_f76_an_end_that_has_passed_or_is_no_time_is_named_and_not_obeyed(caplog: pytest.LogCaptureFixture) -> None:
    """An end time of the job around this one stopped every start after a step; text was a traceback."""
    caplog.set_level("INFO")
    for stated in (str(time.time() - 3600.0), "", "tomorrow", "nan", "-1"):
        assert end_time(None, {"SLURM_JOB_END_TIME": stated}) is None
    assert caplog.text.count("is no time to come, and is not obeyed") == 5
    later = time.time() + 5000.0
    assert end_time(None, {"SLURM_JOB_END_TIME": str(later)}) == pytest.approx(later - 120.0)


def test_f76_an_agent_that_starts_failed_ranks_again_leaves_a_stopped_run_alone(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`torchrun --max-restarts` took code 75 for a failure, and started again what STOP had ended."""
    for restarts, code in (("3", 0), ("0", 75)):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        run = tmp_path / restarts
        given = arguments(config, f"run_dir={run}", "steps=4000", zero="1")
        started = start_ranks(["trainer/train.py", *given], 0)
        wait_for(started, run / "metrics.jsonl")
        (run / "STOP").touch()
        assert started.wait().returncode == code


def test_f76_ranks_are_told_to_stop_without_procps(config: Path, tmp_path: Path) -> None:
    """In an image without pgrep nobody was told, and training went on until it was killed."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for folder in ("/usr/bin", "/bin"):
        for tool in Path(folder).iterdir():
            if tool.name not in ("pgrep", "pkill", "ps") and not (tools / tool.name).exists():
                (tools / tool.name).symlink_to(tool)
    own = environment() | {"PATH": f"{BIN}:{tools}", "RANKS": "1"}
    command = ["bash", str(ROOT / "launch/local.sh"), str(config), f"run_dir={tmp_path}/run", "steps=4000"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=own, stdout=log, stderr=log, start_new_session=True)
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 75, (tmp_path / "log").read_text()
    assert "pgrep" not in (tmp_path / "log").read_text()


def test_f77_what_is_accepted_on_resume_can_be_loaded(config: Path, tmp_path: Path) -> None:
    """Unfreezing, or `ema`, was accepted by name and then refused: "optimizer state is missing"."""
    some = "freeze=[blocks.*]"
    for name in ("unfrozen", "averaged", "frozen"):
        first = [] if name == "frozen" else [some]
        assert train(config, f"run_dir={tmp_path}/{name}", "steps=3", *first, ranks=1).returncode == 0
    changes = {
        "unfrozen": ["--allow-change", "freeze", "--allow-change", "parameters"],
        "averaged": [some, "ema=0.9", "--allow-change", "ema"],
        "frozen": [some, "--allow-change", "freeze", "--allow-change", "parameters"],
    }
    for name, given in changes.items():
        done = train(config, f"run_dir={tmp_path}/{name}", "steps=6", *given)
        assert done.returncode == 0, done.stderr[-2000:]
        kept = manifest(tmp_path / name / "checkpoints/step-00000006")
        recorded = [change for change in kept["progress"]["changes"] if change["name"] == "optimizer state"]
        assert [change["after"] for change in recorded] == (
            ["left out"] if name == "frozen" else ["zero; a running mean: the weights"]
        )
        assert all(change["step"] == 3 for change in recorded)


def test_f79_rank_0_alone_decides_what_a_run_begins_with(config: Path, tmp_path: Path) -> None:
    """A rank that saw no checkpoint entered a broadcast that the others did not."""
    common = [f"run_dir={tmp_path}/run", "model.predict=change", "wind_scan={mode: none}"]
    jobs = [{"overrides": [*common, "steps=3"]}, {"overrides": [*common, "steps=6"], "blind": True}]
    done = train_several(config, jobs)
    assert f"resumed from {tmp_path}/run/checkpoints/step-00000003" in done.stderr
    assert len(losses(tmp_path / "run")) == 6
    other = {"overrides": [f"run_dir={tmp_path}/other"], "of_rank_1": ["batch={total: 8, micro: 1}"], "refused": True}
    lines = told(train_several(config, [other]))
    assert len(lines) == 2
    assert all("rank(s) [1] have another batch: {'total': 8, 'micro': 1}, not" in line["said"] for line in lines)


def test_f80_every_command_asks_one_function_which_rank_it_is() -> None:
    """Under srun and mpirun every task of an evaluation was rank 0, on GPU 0, and wrote the same files."""
    # One write a line, or two ranks would write into one another's.
    code = "from data.process.ranks import world; w = world(); print(f'RANK {w.rank} {w.size}\\n', end='')"
    mpi = subprocess.run(
        [BIN / "mpiexec", "-n", "2", sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(mpi.stdout.split("\n")[:2]) == ["RANK 0 2", "RANK 1 2"]
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment() | slurm, capture_output=True, text=True, check=True
    )
    assert done.stdout == "RANK 3 4\n"
    with pytest.raises(LaunchError, match="SLURM_LOCALID"):
        find_ranks({name: value for name, value in slurm.items() if name != "SLURM_LOCALID"})


def test_f81_appended_hours_are_the_same_data_wherever_that_is_asked(tiny: Store) -> None:
    """An append changed the fingerprint: the best loss began anew, and its checkpoint was deleted."""
    longer = replace(tiny, fingerprint="later", earlier=(tiny.fingerprint,))
    assert longer.origin == tiny.origin
    assert longer.continues(tiny.fingerprint)
    assert not tiny.continues("later")
    older = present(fingerprints={"data": tiny.fingerprint, "wind_scan_orders": "b"})
    newer = present(fingerprints={"data": "later", "wind_scan_orders": "b"})
    assert same_run.compare(Path("c"), older, newer, [], longer.continues)[0]["name"] == "data"
    scored = [
        {"fingerprints": {"data": store.fingerprint, "wind_scan_orders": "b"}, "lineage": [*store.earlier, store.fingerprint]}
        for store in (tiny, longer)
    ]
    assert other_identity(scored[0], scored[1]) == other_identity(scored[1], scored[0]) == []
    scored[1]["lineage"] = ["later"]
    assert other_identity(scored[0], scored[1]) == ["data"]
    last = str(tiny.times[-1].astype("datetime64[D]"))
    assert hours_of(tiny, "train", [("2015-01-02", last)])
    with pytest.raises(DataError, match=f"Write {last}, the last whole day"):
        hours_of(tiny, "train", [("2015-01-02", "2015-12-31")])
    partial = replace(tiny, times=tiny.times[:-5])
    with pytest.raises(DataError, match="the last whole day"):
        hours_of(partial, "train", [("2015-01-02", last)])


def test_f82_who_stood_still_while_its_successor_finished_does_not_go_on(tmp_path: Path) -> None:
    """It made its lock again and wrote on, over what the successor had finished."""
    code = "import sys, time; from pathlib import Path; from data.process import locks; locks.BEAT_S = 0.2\n"
    code += "held = locks.hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    frozen = start_ranks(["-c", code, str(tmp_path / "lock")], 0)
    while "held" not in frozen.out.read_text():
        time.sleep(0.02)
    frozen.signal(signal.SIGSTOP)
    (tmp_path / "lock").unlink()  # taken over, and let go
    frozen.signal(signal.SIGCONT)
    assert frozen.wait(20).returncode == locks.EXIT_ROBBED
    assert not (tmp_path / "lock").exists()


def test_f82_clocks_of_two_hosts_are_never_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The age of a heartbeat was read off by the clock of another host."""
    monkeypatch.setattr(locks, "STALE_S", 2.0)
    lock = tmp_path / "lock"
    owner = {"host": "node7", "process": 1, "started": "5", "system": "another boot", "token": "x", "place": "1:2"}
    for skew in (-1e6, 1e6):
        lock.write_text(json.dumps(owner | {"token": str(skew)}))
        os.utime(lock, (time.time() + skew, time.time() + skew))
        assert locks.holder(lock) == "process 1 on node7"
        began = time.monotonic()
        locks.hold(lock).close()
        assert time.monotonic() - began >= 1.5


def test_f83_a_target_without_any_truth_neither_hides_the_loss_nor_is_the_best_case() -> None:
    """The logged loss was NaN and froze the best one; the "best case" was the sample with the most gaps."""
    truth = torch.rand(2, 3, 4, 4) + 1.0
    truth[:, 1] = torch.nan
    sums = ErrorSums(3, [6], torch.device("cpu"))
    sums.add(truth.nan_to_num(5.0) + 1.0, truth, {"persistence": truth}, torch.ones(4, 4), torch.tensor([6.0, 6.0]))
    deviation = SimpleNamespace(target_std=torch.full((3, 1, 1), 2.0))
    assert normalised_loss(sums, deviation) == pytest.approx(0.25)  # type: ignore[arg-type]
    times = SimpleNamespace(dataset=SimpleNamespace(store=SimpleNamespace(times=np.arange(4))))
    losses, known = np.array([0.0, 0.5, 0.4, 0.9]), np.array([1.0, 90.0, 100.0, 60.0])
    cases = _cases(times, losses, known, np.arange(4), np.full(4, 24))  # type: ignore[arg-type]
    assert [case["analysis"] for case in cases] == ["2", "1", "3"]


def test_f83_leftovers_of_a_kill_are_cleared_and_streams_may_be_closed(config: Path, trained: Path, tmp_path: Path) -> None:
    """Partial directories stayed for ever, and a closed stream ended in a traceback."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for name in ("step-00000009.partial", "step-00000003.replaced.partial"):
        (run / "checkpoints" / name).mkdir()
    command = f"exec {sys.executable} trainer/train.py --config {config} run_dir={run} steps=7 >&- 2>&-"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment(), check=False)
    assert done.returncode == 0
    assert not list((run / "checkpoints").glob("*.partial"))
    assert store.newest(run) == run / "checkpoints/step-00000007"
    listing = f"{sys.executable} -m trainer checkpoint show {run}/checkpoints/latest | head -1"
    done = subprocess.run(["bash", "-c", listing], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.stderr == ""


LOST = """
import os
from trainer.process import launch
os.environ["MASTER_ADDR"] = "no.invalid"
try:
    launch.join(1.0)
except launch.LaunchError as error:
    print(error)
"""


def test_f83_a_master_that_nobody_can_look_up_is_named_at_once() -> None:
    """The rendezvous waited ten minutes for a host that does not exist."""
    done = ranks_of(["-c", LOST], 1)
    assert "MASTER_ADDR=no.invalid" in done.stdout, done.stderr


def test_f83_readers_never_lose_a_race_with_retention(tmp_path: Path) -> None:
    """ "was just removed by its run: take a newer one", said to whoever asked for the newest one."""
    make(tmp_path, 1, None)
    done = threading.Event()

    def trains() -> None:
        for step in range(2, 120):
            make(tmp_path, step, None)
            store.retain(tmp_path, keep_last=1, keep_every=None, newest_step=step)
        done.set()

    thread = threading.Thread(target=trains)
    thread.start()
    read = 0
    while not done.is_set():
        found = loading.newest(tmp_path)
        assert found is not None
        read += 1
    thread.join()
    assert read > 10


def test_f74_resuming_only_looks_and_puts_nothing_aside_before_it_may(trained: Path, tmp_path: Path) -> None:
    """What preflight asks must change nothing."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "checkpoints/step-00000006/weights.safetensors").write_bytes(b"damaged")
    asked = load(run / "config.yaml", ["optimizer.lr=9.0"])
    with pytest.raises(CheckpointError, match=r"optimizer\.lr: 0\.002 then, 9\.0 now"):
        look_back(asked, present(config=asked.model_dump(mode="json")), [])
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-00000003", "step-00000006"]


def test_f72_a_run_is_scored_with_what_it_was_trained_for(trained: Path) -> None:
    """An override of channels or lead times gave random rows to the network, and nothing said so."""
    for override, said in (("data.derived=[sun]", "channel sun"), ("data.lead_hours=[6, 12, 18]", "data.lead_hours 18")):
        with pytest.raises(CheckpointError, match=f"was not trained with {said}"):
            load_forecaster(trained, overrides=[override])


def test_f83_a_listing_that_a_run_has_overtaken_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All checkpoints that were listed had gone, and the run was said to have none."""
    first, read = make(tmp_path, 1, None), store.read

    def overtaken(path: Path) -> Manifest:
        if first.exists():
            make(tmp_path, 2, None)
            shutil.rmtree(first)
        return read(path)

    monkeypatch.setattr(store, "read", overtaken)
    assert [found.step for found in store.look(tmp_path)] == [2]


def test_f83_who_reads_latest_is_not_ended_when_the_run_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mark was looked for in the newer checkpoint, and the process ended at once."""
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    checkpoint = make(tmp_path, 1, None)
    latest = tmp_path / "checkpoints/latest"
    latest.symlink_to(checkpoint.name)
    with store.reading(latest):
        latest.unlink()
        latest.symlink_to(make(tmp_path, 2, None).name)
        time.sleep(6 * locks.BEAT_S)
    assert not list(checkpoint.glob("reading-*"))
    with store.reading(checkpoint):
        for mark in checkpoint.glob("reading-*"):  # as a restart that puts the checkpoint aside
            mark.unlink()
        time.sleep(6 * locks.BEAT_S)
