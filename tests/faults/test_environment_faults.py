"""File systems, terminals, full disks and foreign files as they are: what ended in a traceback, or could not be used."""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.process import locks
from data.process.ranks import World, find_ranks
from data.wind_scan.cache import ScanCache
from tests.distributed.several import FAILING
from tests.faults.test_checkpoint_faults import make
from tests.faults.test_silent_faults import told
from tests.importing import import_weights
from tests.launching import (
    ROOT,
    Started,
    arguments,
    environment,
    free_port,
    manifest,
    module,
    ranks_of,
    run,
    start_ranks,
    tiny_config,
    train_several,
)
from tests.launching import train as start_training
from tests.unit.test_model import SMALL, randomised
from trainer.__main__ import main as trainer_main
from trainer.checkpoint import loading, saving, state, store, zero
from trainer.checkpoint.manifest import CheckpointError, Progress
from trainer.commands import status
from trainer.config import ConfigError
from trainer.config_file import load
from trainer.model.topoflow import TopoFlow
from trainer.run import start, telemetry
from trainer.run.course import Course
from trainer.weights.files import read_file
from trainer.weights.reading import read


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, tiny_scan: ScanCache) -> Path:
    return tiny_config(tmp_path_factory.mktemp("environment"), tiny_path)


HOLDER = """
import sys, time
from pathlib import Path
from data.process import locks
locks.hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def absent(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    for name in ("flock", "lockf", "fcntl"):
        monkeypatch.setattr(fcntl, name, absent)


@pytest.mark.usefixtures("without_flock")
def test_f55_one_owner_and_its_death_is_seen_at_once_without_any_lock_of_the_system(tmp_path: Path) -> None:
    """A file system without flock: a traceback at the start or at the first retention."""
    lock = tmp_path / "lock"
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout
    assert other.stdout.readline() == "held\n"
    assert locks.holder(lock) == f"process {other.pid} on {socket.gethostname()}"
    with pytest.raises(locks.Busy, match=f"process {other.pid} on"):
        locks.hold(lock)
    other.kill()
    other.wait()
    assert locks.holder(lock) is None
    began = time.monotonic()
    with locks.hold(lock):
        assert time.monotonic() - began < 2.0
        assert f"process {os.getpid()} on" in str(locks.holder(lock))
    assert not lock.exists()


def of_another_host(path: Path) -> None:
    path.write_text(json.dumps({"host": "node7", "process": 1, "started": "5", "system": "another boot", "token": "x"}))


def test_f55_an_owner_on_another_host_is_alive_while_its_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's clock is trusted and no process can be asked: only the heartbeat tells."""
    monkeypatch.setattr(locks, "STALE_S", 3.0)
    lock = tmp_path / "lock"
    of_another_host(lock)
    beating = threading.Event()

    def beat() -> None:
        while not beating.wait(0.5):
            os.utime(lock)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(locks.Busy, match="process 1 on node7"):
            locks.hold(lock)
    finally:
        beating.set()
        thread.join()
    began = time.monotonic()
    with locks.hold(lock):  # it has stopped: waited for, then taken over
        assert time.monotonic() - began >= 1.0


def test_f55_a_process_number_that_is_used_again_is_not_the_owner(tmp_path: Path) -> None:
    """After a night, the number of a job that was killed is that of somebody's editor."""
    lock = tmp_path / "lock"
    owner = json.loads(json.dumps(asdict(locks._myself(lock))))
    lock.write_text(json.dumps(owner | {"started": "1"}))  # this very process, which began later
    assert locks.holder(lock) is None
    locks.hold(lock).close()
    lock.write_text(json.dumps(owner))
    assert locks.holder(lock) == f"process {os.getpid()} on {socket.gethostname()}"


def test_f55_of_many_who_take_a_dead_owner_s_place_one_gets_it(tmp_path: Path) -> None:
    """A requeued job and a person's start meet at the lock of a dead process."""
    lock = tmp_path / "lock"
    dead = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert dead.stdout
    dead.stdout.readline()
    dead.kill()
    dead.wait()
    held: list[locks.Held] = []

    def take() -> None:
        with contextlib.suppress(locks.Busy):
            held.append(locks.hold(lock))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1
    held[0].close()


def test_f55_who_was_taken_for_dead_and_comes_back_ends_at_once(tmp_path: Path) -> None:
    """A node that stood still for minutes must not write on into what is another's by now."""
    lock = tmp_path / "lock"
    script = HOLDER.replace("locks.hold", "locks.BEAT_S = 0.2\nlocks.hold")
    robbed = subprocess.Popen(
        [sys.executable, "-c", script, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert robbed.stdout
    robbed.stdout.readline()
    lock.unlink()
    of_another_host(lock)
    _, said = robbed.communicate(timeout=20)
    assert robbed.returncode == locks.EXIT_ROBBED
    assert "another process took over while this one stood still" in said


@pytest.mark.parametrize("obstacle", ["directory", "no links"])
def test_f56_a_link_for_people_that_cannot_be_made_costs_a_warning(
    obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`latest` copied as a directory, or no symbolic links: the job died after each commit, for ever."""
    checkpoint = make(tmp_path, 4, None)
    if obstacle == "directory":
        (checkpoint.parent / "latest").mkdir()
        (checkpoint.parent / "latest/file").touch()
    else:
        monkeypatch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError(errno.EOPNOTSUPP, "not supported")))
    caplog.set_level("INFO")
    for _ in range(3):
        saving._link_latest(checkpoint)
    assert caplog.text.count("does not show the newest checkpoint") == 1
    assert not list(checkpoint.parent.glob("latest.partial"))


MANIFESTS = {
    "not UTF-8": b"\xff\xfe\x00junk",
    "empty": b"",
    "object": b"{}",
    "list": b"[]",
    "number": b"3",
    "null": b"null",
    "cut": None,
    "no files": b'{"step": 6, "files": {}}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_f57_a_manifest_that_cannot_be_read_is_damaged_named_and_stepped_over(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not UTF-8, {}, [], or without fingerprints: a traceback instead of "damaged and skipped"."""
    for step in (2, 4, 6):
        make(tmp_path, step, None)
    newest = tmp_path / "checkpoints/step-00000006/manifest.json"
    content = MANIFESTS[case]
    newest.write_bytes(newest.read_bytes()[:-40] if content is None else content)
    found = loading.newest(tmp_path, step_over=True)
    assert found is not None
    assert found.path == tmp_path / "checkpoints/step-00000004"
    with pytest.raises(CheckpointError, match="The newest whole one is .*step-00000004: name it"):
        loading.newest(tmp_path)
    assert "step-00000006 is damaged and skipped" in caplog.text
    store.retain(tmp_path, keep_last=1, keep_every=None)
    assert newest.exists()
    assert [found.manifest is None for found in store.look(tmp_path)] == [False, True]


@pytest.mark.parametrize(
    "key", ["progress", "fingerprints", "statistics", "config", "deepspeed", "parameters", "files", "format"]
)
@pytest.mark.parametrize("wrong", ["absent", 7, "text", None, [1]])
def test_f57_every_part_of_a_manifest_is_validated(key: str, wrong: Any, tmp_path: Path) -> None:
    """One typed class and one reader: no command meets a manifest that lacks something."""
    file = make(tmp_path, 2, None) / "manifest.json"
    tree = json.loads(file.read_text())
    tree.pop(key)
    file.write_text(json.dumps(tree if wrong == "absent" else tree | {key: wrong}))
    assert "is damaged" in store.verify(file.parent)[0]


def test_f57_a_file_outside_is_damage(tmp_path: Path) -> None:
    """A manifest must not name files outside its directory."""
    folder = make(tmp_path, 2, None)
    tree = manifest(folder)
    tree["files"] = {"../../secret": tree["files"]["weights.safetensors"]}
    (folder / "manifest.json").write_text(json.dumps(tree))
    assert "is not a file inside the checkpoint" in store.verify(folder)[0]


class DictConfig(dict):  # type: ignore[type-arg]
    """Stands for OmegaConf's."""


DictConfig.__module__ = "omegaconf"


@pytest.fixture
def omegaconf(monkeypatch: pytest.MonkeyPatch) -> None:
    made = types.ModuleType("omegaconf")
    made.DictConfig = DictConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "omegaconf", made)


class Noisy:
    """A class of the user's own package, which must not even be imported."""

    def __reduce__(self) -> Any:
        return Noisy._made, (3,)

    @staticmethod
    def _made(number: int) -> Noisy:
        raise AssertionError("executed")


HYPER_PARAMETERS: dict[str, Any] = {
    "plain": {"lr": 5e-4},
    "namespace": argparse.Namespace(lr=5e-4, path=pathlib.Path("/x")),
    "numpy": {"lr": np.float64(5e-4), "lat": np.linspace(0, 1, 4), "dtype": np.dtype("f4")},
    "path": pathlib.Path("/x/y"),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "counter": collections.Counter("aab"),
    "class": torch.optim.AdamW,
    "function": np.mean,
    "omegaconf": DictConfig(lr=1),
    "own class": Noisy(),
    "set": {1, 2},
    "bytes": b"abc",
    "range": range(3),
    "simple namespace": SimpleNamespace(a=1),
}


@pytest.mark.usefixtures("omegaconf")
@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("kind", HYPER_PARAMETERS)
def test_f58_real_lightning_checkpoints_load_and_their_classes_stay_inert(kind: str, old: bool, tmp_path: Path) -> None:
    """argparse.Namespace, numpy scalars, paths and classes beside the tensors: all refused, with the advice to trust them."""
    model = randomised(SMALL, seed=4, dtype=torch.float32)
    content = {
        "state_dict": {f"model.climax.{k}": v for k, v in model.state_dict().items()},
        "epoch": 3,
        "hyper_parameters": HYPER_PARAMETERS[kind],
        "optimizer_states": [torch.optim.AdamW(model.parameters()).state_dict()],
    }
    torch.save(content, tmp_path / "file.ckpt", _use_new_zipfile_serialization=not old)
    tensors, report = import_weights(TopoFlow(SMALL), tmp_path / "file.ckpt", [])
    report.refuse_unless_complete()
    for name, parameter in model.named_parameters():
        assert torch.equal(tensors[name].view_as(parameter), parameter), name


@pytest.mark.parametrize(
    "keys", [["model"], ["model_state_dict"], ["module"], ["state_dict"], ["model", "state_dict"], ["checkpoint", "model"]]
)
def test_f58_the_state_is_found_under_the_keys_people_use(keys: list[str], tmp_path: Path) -> None:
    """{"model": ...}, {"model_state_dict": ...}, {"module": ...}, nested once."""
    state_dict = randomised(SMALL, dtype=torch.float32).state_dict()
    content: Any = state_dict
    for key in reversed(keys):
        content = {key: content, "epoch": 1}
    torch.save(content, tmp_path / "file.pt")
    assert read_file(tmp_path / "file.pt").chosen(raw=False)[0] == ".".join(keys)
    import_weights(TopoFlow(SMALL), tmp_path / "file.pt", [])[1].refuse_unless_complete()


def test_f58_of_weights_and_their_average_it_is_said_which_was_taken(tmp_path: Path) -> None:
    """An EMA copy beside the weights, as a dictionary of its own or under a prefix: one rule, whichever stands first."""
    own = randomised(SMALL, dtype=torch.float32).state_dict()
    averaged = {name: value if name.endswith("H_scale") else value + 1 for name, value in own.items()}
    torch.save({"state_dict": own, "ema_state_dict": averaged}, tmp_path / "beside.ckpt")
    torch.save(
        {"state_dict": {f"net.{k}": v for k, v in own.items()} | {f"ema.{k}": v for k, v in averaged.items()}},
        tmp_path / "prefix.ckpt",
    )
    for name, sets in (("beside", ("state_dict", "ema_state_dict")), ("prefix", ("state_dict.net", "state_dict.ema"))):
        for raw in (False, True):
            tensors, report = import_weights(TopoFlow(SMALL), tmp_path / f"{name}.ckpt", raw=raw)
            report.refuse_unless_complete()
            assert torch.equal(tensors["norm.weight"], (own if raw else averaged)["norm.weight"])
            assert (report.taken, report.also) == (sets[not raw], [sets[raw]])


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def zipped(path: Path, **members: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


WRONG_FILES = {
    "empty": (lambda d: written(d / "a.ckpt", b""), "it is empty"),
    "text": (lambda d: written(d / "a.pt", b"hello world\n"), "it is text, beginning with 'hello world'"),
    "pointer": (lambda d: written(d / "a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
    "page": (lambda d: written(d / "a.ckpt", b"<!DOCTYPE html><html>404"), "a web page"),
    "hdf5": (lambda d: written(d / "a.h5", b"\x89HDF\r\n\x1a\n" + bytes(99)), "HDF5"),
    "gzip": (lambda d: written(d / "a.ckpt", b"\x1f\x8b" + bytes(99)), "compressed by gzip"),
    "binary": (lambda d: written(d / "a.ckpt", bytes(range(200, 250))), "of a format that is not known here"),
    "zip": (lambda d: zipped(d / "a.zip", readme="x"), "a zip archive without weights"),
    "script": (lambda d: zipped(d / "a.pt", **{"m/data.pkl": "", "m/constants.pkl": ""}), "TorchScript"),
    "json": (lambda d: written(d / "a.json", b'{"a": 1}'), "JSON"),
    "latest": (lambda d: written(d / "latest", b"\xff\xfe\x00").parent, "latest is not the text that DeepSpeed writes"),
    "directory": (lambda d: d, "is not a checkpoint directory"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_f59_a_file_of_another_kind_is_told_by_its_first_bytes(case: str, tmp_path: Path) -> None:
    """An empty file, a git-LFS pointer, a `latest` that is no text: tracebacks, or three screens of torch's."""
    make_file, message = WRONG_FILES[case]
    with pytest.raises(CheckpointError, match=message) as refused:
        read(make_file(tmp_path))
    assert len(str(refused.value).splitlines()) < 4


def test_f59_a_json_of_somebody_else_beside_the_weights_is_no_record(tmp_path: Path) -> None:
    """{"architectures": [...]} beside a safetensors file was taken for our own record."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, file)
    for text in ('{"architectures": ["Foo"]}', "[]", '{"step": 3}'):
        file.with_suffix(".json").write_text(text)
        assert read(file).record is None


def test_f60_what_the_job_would_refuse_preflight_refuses(config: Path) -> None:
    """Preflight passed a run directory whose resume was refused, and a W&B project without W&B."""
    folder = f"run_dir={config.parent}/examined"
    assert start_training(config, folder, "steps=2", ranks=1).returncode == 0
    command = ["trainer", "preflight", "--config", str(config), folder, "steps=4"]
    other = module(*command, "optimizer.lr=1e-4")
    assert other.returncode == 1
    assert "failed: resume" in other.stdout
    assert "optimizer.lr: 0.002 then, 0.0001 now" in other.stdout
    assert module(*command, "optimizer.lr=1e-4", "--allow-change", "optimizer.lr").returncode == 0
    started = start_training(config, folder, "telemetry.wandb_project=x", "steps=4", ranks=2)
    assert "wandb is not installed" in started.stderr
    assert "all-reduce" not in started.stderr  # before the ranks have met


def test_f60_without_a_network_metrics_are_recorded_offline(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    """W&B that cannot be reached killed the run."""
    tried = []

    class Unreachable(Exception):
        pass

    def init(mode: str = "online", **_: Any) -> str:
        tried.append(mode)
        if mode == "online":
            raise Unreachable("no network")
        return "a run"

    fake = types.ModuleType("wandb")
    fake.init, fake.errors = init, SimpleNamespace(Error=Unreachable)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert telemetry._start_wandb(load(config, ["telemetry.wandb_project=x"])) == "a run"
    assert tried == ["online", "offline"]


LISTENER = """
import ctypes, sys, tempfile, time
from pathlib import Path
from trainer.process import launch, stop
launch.join(1.0)
stop = stop.StopVote(Path(tempfile.mkdtemp()), None)
print("ready", flush=True)
deadline = time.monotonic() + 20
while time.monotonic() < deadline:  # the interpreter's main thread hardly ever runs, as in a collective
    ctypes.CDLL(None).sleep(5)
    if stop.reason and len(sys.argv) > 1:
        print(stop.reason, flush=True)
        stop.finish()
        break
"""


def started_anew(argv: list[str], folder: Path) -> Started:
    """Not forked: what happens while Python tidies up at its end is part of the test."""
    out, err = folder / "out", folder / "err"
    with out.open("w") as said, err.open("w") as errors:
        process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, env=environment(), stdout=said, stderr=errors)
    return StartedAnew(argv, [process.pid], out, err, process)


@dataclass
class StartedAnew(Started):
    process: subprocess.Popen[bytes]

    def wait(self, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        code = self.process.wait(timeout)
        return subprocess.CompletedProcess(self.argv, code, self.out.read_text(), self.err.read_text())


def test_f61_every_wish_to_stop_is_heard_in_a_collective_and_a_second_one_ends_the_process(tmp_path: Path) -> None:
    """Ctrl-C, SIGHUP and a second SIGTERM had three behaviours, two of them a traceback."""
    cases = (((signal.SIGHUP, signal.SIGHUP), 0), ((signal.SIGINT,), 0), ((signal.SIGTERM, None, signal.SIGINT), 130))
    for numbers, code in cases:
        argv = ["-c", LISTENER, *([] if code else ["x"])]
        process = start_ranks(argv, 0) if code else started_anew(argv, tmp_path)
        while "ready" not in process.out.read_text():
            assert process.alive(), process.err.read_text()
            time.sleep(0.02)
        for number in numbers:
            time.sleep(0.05 if number else 0.8)
            if number:
                process.signal(number)
        done = process.wait(30)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert (signal.Signals(numbers[0]).name in done.stdout) == (code == 0)


def test_f61_ctrl_c_during_a_validation_leaves_it_and_saves(config: Path) -> None:
    """A wish to stop waited for the end of a long validation, and a launcher kills after 30 s."""
    folder = config.parent / "interrupted"
    overrides = [
        f"run_dir={folder}",
        "steps=4000",
        "validation.every=2",
        "validation.samples=400",
        "batch={total: 2, micro: 1}",
    ]
    process = start_ranks(["trainer/train.py", *arguments(config, *overrides, zero="1")], 0)
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and '"step": 2,' in metrics.read_text()):
        assert process.alive(), process.err.read_text()
        time.sleep(0.05)
    time.sleep(0.4)  # into the validation of step 2
    process.signal(signal.SIGINT)
    done = process.wait(30)
    said = done.stderr
    assert done.returncode == 75, said
    step = manifest(folder / "checkpoints/latest")["progress"]["step"]
    assert f"stopped at step {step} (SIGINT)" in said
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert not [row for row in rows if row["kind"] == "validation" and row["step"] == step]


def test_f62_an_error_that_nobody_foresaw_is_kept_and_is_no_refusal_however_it_was_started(
    config: Path, tiny_path: Path, tmp_path: Path
) -> None:
    """`python -m trainer train` took a failed disk for a wrong option: code 2, which nobody starts again, and no traceback."""
    store = tmp_path / "s.zarr"
    shutil.copytree(tiny_path, store)
    for shard in (store / "chemistry/c").rglob("0"):
        if shard.is_file():
            shard.unlink()
            shard.mkdir()  # opening it is an OSError
    folder = tmp_path / "run"
    given = [f"run_dir={folder}", f"data.store={store}"]
    done = module("trainer", "train", *arguments(config, *given, zero="1"))
    assert done.returncode == 1, done.stderr
    assert "error: IsADirectoryError" in done.stderr
    assert "Traceback" in (folder / "errors/rank-0.log").read_text()


def test_f61_an_interrupted_command_says_so_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in an import or an evaluation was a traceback."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(status, "look", interrupted)
    assert trainer_main(["status", "somewhere"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_f62_the_error_of_one_rank_is_what_the_console_ends_with(config: Path, launcher: str) -> None:
    """The other ranks' lost connections and the launcher's lines buried the one line that matters."""
    folder = config.parent / f"broken-{launcher}"
    begin = {
        "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2"],
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())],
    }[launcher]
    began = time.monotonic()
    done = run([*begin, "tests/distributed/broken.py", *arguments(config, f"run_dir={folder}", "steps=4000", zero="1")])
    assert done.returncode != 0
    assert time.monotonic() - began < 60
    own = [line for line in done.stderr.splitlines() if line.startswith(("error:", "[rank"))]
    message = "error: KeyError: 'a variable that nobody foresaw'"
    assert own == [f"[rank 1] {message}", f"error: ended because rank 1 failed: {message}"], done.stderr[-3000:]
    before_torchruns_own = done.stderr.split("Traceback (most recent call last):\n  File")[0]
    assert f"ended because rank 1 failed: {message}" in before_torchruns_own
    assert done.stderr.count("Traceback") == (1 if launcher == "torchrun" else 0)
    kept = (folder / "errors/rank-1.log").read_text()
    assert "Traceback" in kept
    assert "failing_step" in kept


def test_f63_what_a_rank_opens_does_not_grow_with_the_data_and_only_rank_0_reads_checkpoints(
    config: Path, tmp_path: Path
) -> None:
    """Every rank hashed the whole wind scan of six years, read all tables of the store, and the whole manifest."""
    from data.store.opening import open_store
    from data.synthetic.recipe import Recipe
    from data.synthetic.synthesize import synthesize
    from data.wind_scan.cache import build

    opened = {}
    for days in (6, 20):
        path = tmp_path / f"{days}.zarr"
        synthesize(path, Recipe(days=days, rows=16, cols=32, shard_hours=24, train=0.6, validation=0.2))
        build(open_store(path), path.with_suffix(".wind_scan"), patch=2, regions=(4, 4), sectors=16)
        common = [
            f"run_dir={tmp_path}/run{days}",
            f"data.store={path}",
            f"wind_scan.cache={path.with_suffix('.wind_scan')}",
            "validation.samples=2",
            "batch={total: 2, micro: 1}",
            "schedule.warmup_steps=0",
        ]
        jobs = [{"overrides": [*common, "steps=1"]}, {"overrides": [*common, "steps=2"], "opened": True}]
        ranks = {line["rank"]: line["files"] for line in told(train_several(config, jobs), "OPENED")}
        opened[days] = [name.removeprefix(f"{tmp_path}/{days}") for name in ranks[1] if "/c/" not in name]
        assert any("manifest.json" in name for name in ranks[0])
    assert opened[6] == opened[20] == [".wind_scan/sectors.npy", ".zarr/chemistry/zarr.json", ".zarr/weather/zarr.json"]


def test_f64_the_count_of_updates_lies_where_the_fused_optimizer_wants_it() -> None:
    """Elastic resume could not work on a GPU: the loader left `step` on the CPU, where fused AdamW refuses it."""
    for fused, place in ((True, "meta"), (False, "cpu")):
        parameter = torch.nn.Parameter(torch.empty(3, device="meta"))
        optimizer = torch.optim.AdamW([parameter], fused=False)
        optimizer.defaults["fused"] = fused
        zero.create_states(SimpleNamespace(optimizer=optimizer, ema_decay=None))
        assert optimizer.state[parameter]["step"].device.type == place
        assert optimizer.state[parameter]["exp_avg"].device.type == "meta"


def test_f64_zero_3_and_1_interchange_with_both_moments_and_in_several_files(config: Path) -> None:
    """The optimizer's state is our own, by name: one file free of stage and ranks, or several where it is large."""
    folder = config.parent / "interchange"

    def job(zero: str, name: str, steps: int) -> dict[str, Any]:
        return {"zero": zero, "overrides": [f"run_dir={folder}/{name}", f"steps={steps}"]}

    train_several(config, [job("1", "whole", 8), job("3", "to1", 4), job("1", "to3", 4)])
    train_several(config, [job("1", "to1", 8), job("3", "to3", 8)])
    truth = load_file(folder / "whole/checkpoints/step-00000008/optimizer.safetensors")
    for name in ("to1", "to3"):
        ours = load_file(folder / name / "checkpoints/step-00000008/optimizer.safetensors")
        for key, value in truth.items():
            assert float((ours[key] - value).norm()) <= 1e-5 * float(value.norm()) + 1e-9, key
    sizes = {"a": 100, "b": 50, "c": 300, "d": 1}
    cut = state.shares(sizes, ranks=4, share_bytes=8 * 150)
    assert [names for _, _, names in cut] == [["a", "b"], ["c"], ["d"]]
    assert [writer for _, writer, _ in cut] == [0, 1, 2]
    assert [str(file) for file, _, _ in cut][0] == "optimizer-001-of-003.safetensors"
    assert state.shares(sizes, ranks=4)[0][0] == Path("optimizer.safetensors")


def test_f65_bf16_gradients_of_eight_ranks_are_averaged_and_accumulated_in_fp32(config: Path) -> None:
    """They were reduced and accumulated in bf16: 2 to 3 % of error in a ring of 400."""
    stages = {zero: arguments(config, zero=zero)[3] for zero in "0123"}
    done = ranks_of(["tests/distributed/gradients.py", str(config), json.dumps(stages)], 8)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line.removeprefix("GRADIENT ")) for line in done.stdout.splitlines() if line.startswith("GRADIENT ")]
    assert {line["zero"] for line in lines} == set("0123")
    assert all(line["error"] < 1e-5 for line in lines), lines


SURVIVED = ("retention", "link")


def test_f66_what_rank_0_alone_cannot_do_every_rank_refuses(config: Path) -> None:
    """A rank that failed waited for its peers in destroy_process_group for 30 minutes, and logged its error after that."""
    torch.manual_seed(3)

    weights = config.parent / "weights.safetensors"
    save_file(TopoFlow(load(config).architecture()).state_dict(), weights)
    names = [name for name in FAILING if name not in SURVIVED]
    jobs = [
        {
            "overrides": [
                f"run_dir={config.parent}/alone-{i}",
                "steps=2",
                "schedule.warmup_steps=0",
                f"init_from.path={weights}",
            ],
            "fails": [name],
            "refused": True,
        }
        for i, name in enumerate(names)
    ]
    lines = told(train_several(config, jobs))
    assert len(lines) == 2 * len(names)
    for i, name in enumerate(names):
        mine = [line for line in lines if f"injected into {name}" in line["said"]]
        assert sorted(line["rank"] for line in mine) == [0, 1], (i, name, lines)
        assert all(line["seconds"] < 10 for line in mine)


def test_f67_a_full_disk_costs_metrics_and_room_never_the_step(config: Path, tmp_path: Path) -> None:
    """Retention, `latest` and telemetry on a full disk could end a run."""
    folder = config.parent / "full-disk"
    job = {"overrides": [f"run_dir={folder}", "steps=6", "checkpoint={every: 2, keep_last: 1}"], "fails": list(SURVIVED)}
    done = train_several(config, [job])
    assert "old checkpoints were not removed" in done.stderr
    assert "does not show the newest checkpoint" in done.stderr
    assert [found.step for found in store.look(folder)] == [2, 4, 6]

    class Full:
        def write(self, text: str = "") -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        close = flush = write

    run = load(config, [f"run_dir={tmp_path}"])
    record = telemetry.Telemetry(run, Course(run, Progress()))
    with record:
        record._jsonl = Full()  # type: ignore[assignment]
        record._tensorboard.add_scalar = lambda *_: Full().write("")
        record.record("train", 1, {"loss": 1.0})
        record.rewind()
        record.record("train", 2, {"loss": 1.0})
    assert store.verify(make(tmp_path, 1, None)) == []


def test_f68_roll_backs_are_capped_counted_and_kept_whatever_comes_next(config: Path) -> None:
    """A roll-back had no cap, and a stop right after it forgot which samples were stepped over."""
    folder = config.parent / "capped"
    bad = [[88, 96], [104, 112]]
    overrides = [
        f"run_dir={folder}",
        "steps=20",
        "checkpoint.every=5",
        "schedule.warmup_steps=0",
        "model.dropout=0.0",
        "spikes={policy: roll_back, factor: 4.0, most_roll_backs: 1}",
    ]
    lines = told(train_several(config, [{"overrides": overrides, "spike_at": bad, "refused": True}]))
    assert all("rolled back 1 times already" in line["said"] for line in lines)
    remembered = manifest(folder / "checkpoints/step-00000010")["progress"]
    assert (remembered["roll_backs"], remembered["stepped_over"]) == (1, bad[:1])


def test_f68_the_best_loss_belongs_to_its_validation_set(config: Path, tmp_path: Path) -> None:
    """validation.samples changed on resume kept the other set's best for ever."""
    folder = config.parent / "sets"
    jobs = [
        {"overrides": [f"run_dir={folder}", f"steps={steps}", f"validation.samples={samples}"]}
        for steps, samples in ((2, 6), (4, 6), (6, 4))
    ]
    train_several(config, jobs)
    found = {step: manifest(folder / f"checkpoints/step-0000000{step}")["progress"] for step in (2, 4, 6)}
    assert found[2]["validated_on"] == found[4]["validated_on"] != found[6]["validated_on"]
    assert found[6]["best_val_loss"] == found[6]["val_loss"]
    for step, loss, which in ((10, 0.1, "old"), (20, 0.5, "new"), (30, 0.4, "new"), (40, 0.6, "new")):
        make(tmp_path, step, loss, validated_on=which)
    store.retain(tmp_path, keep_last=1, keep_every=None)
    assert [found.step for found in store.look(tmp_path)] == [30, 40]


def test_f68_a_run_directory_is_what_a_shell_makes_of_it(config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """~, $VAR and a relative run_dir from another directory silently began a new run."""
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HOME", "/home/me")
    assert load(config, ["run_dir=$SCRATCH/runs/a"]).run_dir == Path("/scratch/me/runs/a")
    assert load(config, ["run_dir=~/runs/a"]).run_dir == Path("/home/me/runs/a")
    with pytest.raises(ConfigError, match=r"environment variable \$NOWHERE is not set"):
        load(config, ["run_dir=$NOWHERE/a"])
    make(tmp_path / "project/runs/a", 5, None)
    (tmp_path / "project/launch").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    run_dir = load(config, ["run_dir=runs/a"]).run_dir
    assert start.of_another_directory(run_dir, tmp_path / "project/launch/c.yaml") == tmp_path / "project/runs/a"
    monkeypatch.chdir(tmp_path / "project")
    assert start.of_another_directory(Path.cwd() / "runs/a", tmp_path / "project/launch/c.yaml") is None


def test_f69_a_batch_shell_is_one_process_and_ranks_compute_alike(config: Path) -> None:
    """SLURM_NTASKS of the batch shell was taken for ranks; one rank's slower kernel made all wait without a word."""
    batch_shell = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "7"}
    assert find_ranks(batch_shell) == World(0, 0, 1, "single process")
    assert find_ranks(batch_shell | {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9"}) == World(9, 0, 16, "srun")
    job = {
        "overrides": [f"run_dir={config.parent}/kernels", "steps=1", "schedule.warmup_steps=0"],
        "refused": True,
        "kernel_of_rank_1": "query chunks",
    }
    lines = told(train_several(config, [job]))
    assert len(lines) == 2
    assert all(
        "rank(s) [1] have another kernel of the elevation bias: query chunks, not flash halves" in line["said"]
        for line in lines
    )


def test_f69_a_requeued_job_waits_for_the_lock_of_a_dead_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of a node that had died ended the requeued job with the final code 2."""
    monkeypatch.setattr(locks, "STALE_S", 2.0)
    of_another_host(tmp_path / "lock")
    began = time.monotonic()
    locks.hold(tmp_path / "lock").close()
    assert 1.0 < time.monotonic() - began < 10.0
