"""Checkpoints that are lost, damaged, of another run, or on some ranks only; on hand-made ones and on real runs."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data.wind_scan.cache import ScanCache
from tests.launching import arguments, losses, manifest, module, ranks_of, start_ranks, tiny_config, train
from trainer.checkpoint import same_run, store
from trainer.checkpoint.consistency import hash_tensors
from trainer.checkpoint.manifest import CheckpointError, FileRecord, Manifest, Memory, Progress, sha256_of, write
from trainer.checkpoint.state import WEIGHTS_FILE


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, tiny_scan: ScanCache) -> Path:
    return tiny_config(tmp_path_factory.mktemp("faults"), tiny_path)


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    """A run of 4 steps."""
    done = train(config, f"run_dir={config.parent}/finished", "steps=4")
    assert done.returncode == 0, done.stderr[-3000:]
    return config.parent / "finished"


def make(run_dir: Path, step: int, val_loss: float | None, **progress: object) -> Path:
    """A checkpoint of a network of one parameter."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    file, tensors = folder / WEIGHTS_FILE, {"w": torch.tensor([1.0, step])}
    save_file(tensors, file)
    record = FileRecord(bytes=file.stat().st_size, sha256=sha256_of(file))
    about = {"step": step, "val_loss": val_loss, "val_step": -1 if val_loss is None else step, **progress}
    remembered = present().model_copy(update={"progress": Progress(**about)})  # type: ignore[arg-type]
    content = {"format": 2, "files": {str(WEIGHTS_FILE): record}, "tensors": hash_tensors(tensors.items())}
    write(Manifest(**dict(remembered), **content), folder / "manifest.json")
    return folder


def steps(run_dir: Path) -> list[int]:
    return [found.step for found in store.look(run_dir)]


def test_f33_retention_keeps_the_best_the_last_and_the_milestones(tmp_path: Path) -> None:
    """All checkpoints but one were deleted, the wrong one kept: the metric was parsed out of a file name."""
    for step, loss in ((10, 0.9), (20, 0.3), (30, 0.5), (40, None), (50, 0.6), (60, 0.7), (70, 0.8)):
        make(tmp_path, step, loss)
    store.retain(tmp_path, keep_last=2, keep_every=30)
    assert steps(tmp_path) == [20, 30, 60, 70]


def test_f33_retention_trusts_neither_stale_nor_unfinite_losses_nor_damaged_checkpoints(tmp_path: Path) -> None:
    """A loss measured on other weights, a NaN, or a truncated checkpoint must not be the best, or stop the run."""
    for step, loss in ((10, float("nan")), (20, 0.2), (30, 0.1), (40, 0.5), (50, 0.6)):
        make(tmp_path, step, loss)
    stale = tmp_path / "checkpoints/step-00000030/manifest.json"
    tree = json.loads(stale.read_text())
    tree["progress"]["val_step"] = 25
    stale.write_text(json.dumps(tree))
    (tmp_path / "checkpoints/step-00000040" / WEIGHTS_FILE).write_bytes(b"")
    store.retain(tmp_path, keep_last=1, keep_every=None)
    assert sorted(found.path.name for found in store.look(tmp_path)) == ["step-00000020", "step-00000040", "step-00000050"]


def test_f33_retention_leaves_a_checkpoint_that_is_being_read(tmp_path: Path) -> None:
    """A reader holds it open; the next retention removes it."""
    first = make(tmp_path, 10, None)
    make(tmp_path, 20, None)
    with store.reading(first):
        store.retain(tmp_path, keep_last=1, keep_every=None)
        assert steps(tmp_path) == [10, 20]
    store.retain(tmp_path, keep_last=1, keep_every=None)
    assert steps(tmp_path) == [20]
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def test_what_is_not_whole_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path, 10, 0.1)
    file = folder / WEIGHTS_FILE
    assert store.verify(folder) == []
    content = bytearray(file.read_bytes())
    content[50] ^= 1
    file.write_bytes(content)
    assert store.verify(folder) == ["weights.safetensors does not have the sha256 that was recorded"]
    file.write_bytes(content[:60])
    assert f"has 60 bytes, {len(content)} were written" in store.verify(folder)[0]
    file.unlink()
    assert "has None bytes" in store.verify(folder)[0]
    (folder / "manifest.json").write_text('{"step": 1')
    assert "cannot be read" in store.verify(folder)[0]


CONFIG = {"optimizer": {"lr": 1.0, "clip": 1.0}, "steps": 5, "data": {"lead_hours": [12], "prefetch": 1}}
FINGERPRINTS = {"data": "a", "wind_scan_orders": "b"}


def present(**changes: object) -> Memory:
    memory = Memory(
        progress=Progress(),
        config=CONFIG,
        deepspeed={"zero_optimization": {"stage": 1}},
        fingerprints=FINGERPRINTS,
        statistics={},
        parameters={"w": {"group": "decay", "shape": [2]}},
        world_size=1,
        zero_stage=1,
        version="0",
    )
    return memory.model_copy(update=changes)


def test_f26_other_parameters_or_groups_are_refused() -> None:
    """Optimizer state was matched by position in two different orders: 91 of 91 moments sat on the wrong tensors."""
    for name, group in (("v", "decay"), ("w", "no_decay")):
        with pytest.raises(CheckpointError, match=r"parameters\.w\.group: decay then"):
            same_run.compare(Path("c"), present(), present(parameters={name: {"group": group, "shape": [2]}}), [])


@pytest.mark.parametrize("name", ["data", "wind_scan_orders"])
def test_f09_f10_other_data_statistics_or_orders_are_refused(name: str) -> None:
    """Statistics came from whichever frame was read first, caches were compared by the hash of a pickle."""
    other = present(fingerprints=FINGERPRINTS | {name: "other"})
    with pytest.raises(CheckpointError, match=f"{name}: . then, other now"):
        same_run.compare(Path("c"), present(), other, [])


def test_f27_changes_are_refused_unless_allowed_and_then_recorded() -> None:
    """Rates differed silently from the run being resumed."""
    other = present(config=CONFIG | {"optimizer": {"lr": 2.0, "clip": 1.0}, "steps": 9})
    with pytest.raises(CheckpointError, match=r"optimizer.lr: 1.0 then, 2.0 now"):
        same_run.compare(Path("c"), present(), other, [])
    assert same_run.compare(Path("c"), present(), other, ["optimizer.lr"]) == [
        {"name": "optimizer.lr", "before": 1.0, "after": 2.0}
    ]
    assert same_run.compare(Path("c"), present(), present(), []) == []


def test_f07_a_rank_that_differs_is_named_with_its_tensor(config: Path) -> None:
    """ "Only rank 0 has the weights" was never proven; nothing could tell. One of four ranks is corrupted."""
    stages = {zero: arguments(config, zero=zero)[3] for zero in "0123"}
    done = ranks_of(["tests/distributed/divergent.py", str(config), json.dumps(stages)], 4)
    assert done.returncode == 0, done.stderr[-3000:]
    for zero in "0123":
        ranks = "[0, 1, 2, 3]" if zero == "3" else "[2]"  # what ZeRO 3 gathers is wrong everywhere
        for rank in range(4):
            assert f"ZeRO {zero} rank {rank} equal" in done.stdout
            for kind, name in (("weights", "norm.bias"), ("moments", "norm.bias.exp_avg")):
                line = next(x for x in done.stdout.splitlines() if x.startswith(f"ZeRO {zero} rank {rank} refused {kind}"))
                assert f"tensor '{name}' differs from" in line
                where = "[0, 1, 2, 3]" if kind == "moments" and zero != "0" else ranks  # a moment is gathered from its owners
                assert f"on rank(s) {where}" in line


def test_f27_resume_with_another_batch_or_rate_is_refused(config: Path, finished: Path) -> None:
    """Batch, accumulation and rates differed silently from the run being resumed."""
    done = train(config, f"run_dir={finished}", "optimizer.lr=1e-3", "batch.micro=4", "steps=50")
    assert done.returncode != 0
    assert "optimizer.lr: 0.002 then, 0.001 now" in done.stderr
    assert "batch.micro: 2 then, 4 now" in done.stderr
    assert "Traceback" not in done.stderr


def test_f35_evaluation_with_other_statistics_is_refused(finished: Path) -> None:
    """Evaluation de-normalised with other statistics than training: the store's identity is in the checkpoint."""
    file = finished / "checkpoints/step-00000004/manifest.json"
    kept = file.read_text()
    try:
        file.write_text(kept.replace(json.loads(kept)["fingerprints"]["data"], "0" * 64))
        done = module("trainer", "evaluate", str(finished))
    finally:
        file.write_text(kept)
    assert done.returncode == 2
    assert "was trained with data 000000000000" in done.stderr


def test_a_full_disk_during_a_save_is_named_and_the_checkpoint_before_still_works(config: Path) -> None:
    """The limit on a file's size stands for a full disk: the writers get the same kind of error."""
    folder = config.parent / "full"
    done = train(config, f"run_dir={folder}", "steps=4")
    assert done.returncode == 0, done.stderr[-3000:]
    largest = max(f.stat().st_size for f in (folder / "checkpoints").rglob("*.safetensors"))
    started = start_ranks(["trainer/train.py", *arguments(config, f"run_dir={folder}", "steps=8", zero="1")], 2)
    for pid in started.pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (largest // 2, largest // 2))
    done = started.wait()
    assert done.returncode != 0
    assert "step-00000008 could not be written (rank 0: " in done.stderr
    assert "are intact: make room" in done.stderr
    assert steps(folder) == [4]
    done = train(config, f"run_dir={folder}", "steps=8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resumed from {folder}/checkpoints/step-00000004" in done.stderr
    assert len(losses(folder)) == 8


def test_f34_time_limit_saves_and_says_how_to_continue(config: Path) -> None:
    """A 24 h wall limit, no last checkpoint: only the best validation was saved."""
    folder = config.parent / "limited"
    done = train(config, f"run_dir={folder}", "steps=4000", "--time-limit", "0.03", ranks=1, zero="0")
    assert "stopped at step" in done.stderr
    assert "the time limit" in done.stderr
    step = manifest(folder / "checkpoints/latest")["progress"]["step"]
    assert 0 < step < 4000
    assert os.readlink(folder / "checkpoints/latest") == f"step-{step:08d}"


def test_f27_an_allowed_change_is_recorded(config: Path) -> None:
    """What was accepted by name stands in every later manifest."""
    folder = config.parent / "changed"
    for overrides in (["steps=2"], ["steps=4", "optimizer.clip=2.0", "--allow-change", "optimizer.clip"]):
        done = train(config, f"run_dir={folder}", *overrides, ranks=1, zero="0")
        assert done.returncode == 0, done.stderr[-3000:]
    changes = manifest(folder / "checkpoints/latest")["progress"]["changes"]
    assert changes == [{"step": 2, "name": "optimizer.clip", "before": 1.0, "after": 2.0}]
