"""Retention, verification and the comparison on resume, on small hand-made checkpoints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from trainer.checkpoint import resume, store
from trainer.checkpoint.store import CheckpointError


def make(run_dir: Path, step: int, val_loss: float | None) -> Path:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "data.bin").write_bytes(bytes([step % 256]) * 100)
    files = {"data.bin": {"bytes": 100, "sha256": hashlib.sha256((folder / "data.bin").read_bytes()).hexdigest()}}
    (folder / "manifest.json").write_text(
        json.dumps({"step": step, "files": files, "val_loss": val_loss, "val_step": -1 if val_loss is None else step})
    )
    return folder


def steps(run_dir: Path) -> list[int]:
    return [store.manifest(c)["step"] for c in store.committed(run_dir)]


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
    stale.write_text(json.dumps(json.loads(stale.read_text()) | {"val_step": 25}))
    (tmp_path / "checkpoints/step-00000040/data.bin").write_bytes(b"")
    store.retain(tmp_path, keep_last=1, keep_every=None)
    assert sorted(c.name for c in store.committed(tmp_path)) == ["step-00000020", "step-00000040", "step-00000050"]


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
    assert store.verify(folder) == []
    content = bytearray((folder / "data.bin").read_bytes())
    content[50] ^= 1
    (folder / "data.bin").write_bytes(content)
    assert store.verify(folder) == ["data.bin does not have the sha256 that was recorded"]
    (folder / "data.bin").write_bytes(content[:60])
    assert "has 60 bytes, 100 were written" in store.verify(folder)[0]
    (folder / "data.bin").unlink()
    assert "has None bytes" in store.verify(folder)[0]
    (folder / "manifest.json").write_text('{"step": 1')
    assert "is damaged" in store.verify(folder)[0]


def present(**changes: object) -> dict:
    config = {"optimizer": {"lr": 1.0, "clip": 1.0}, "steps": 5, "data": {"lead_hours": [12], "prefetch": 1}}
    tree = {
        "config": config,
        "fingerprints": {"data": "a", "wind_scan_orders": "b"},
        "optimizer_layout": [["decay", [["w", [2]]]]],
    }
    return tree | changes


def test_f26_optimizer_state_of_another_parameter_order_is_refused() -> None:
    """Optimizer state was matched by position in two different orders: 91 of 91 moments sat on the wrong tensors."""
    with pytest.raises(CheckpointError, match="optimizer_layout"):
        resume.compare(Path("c"), present(), present(optimizer_layout=[["decay", [["v", [2]]]]]), [])


@pytest.mark.parametrize("name", ["data", "wind_scan_orders"])
def test_f09_f10_other_data_statistics_or_orders_are_refused(name: str) -> None:
    """Statistics came from whichever frame was read first, caches were compared by the hash of a pickle."""
    other = present(fingerprints=present()["fingerprints"] | {name: "other"})
    with pytest.raises(CheckpointError, match=f"{name}: . then, other now"):
        resume.compare(Path("c"), present(), other, [])


def test_f27_changes_are_refused_unless_allowed_and_then_recorded() -> None:
    """Rates differed silently from the run being resumed."""
    other = present(config=present()["config"] | {"optimizer": {"lr": 2.0, "clip": 1.0}, "steps": 9})
    with pytest.raises(CheckpointError, match=r"optimizer.lr: 1.0 then, 2.0 now"):
        resume.compare(Path("c"), present(), other, [])
    assert resume.compare(Path("c"), present(), other, ["optimizer.lr"]) == [
        {"name": "optimizer.lr", "before": 1.0, "after": 2.0}
    ]
    assert resume.compare(Path("c"), present(), present(), []) == []
