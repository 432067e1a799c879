"""Import over real ranks: read once, broadcast, compared; and the step-0 gate."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.wind_scan.cache import ScanCache
from tests.launching import manifest, module, tiny_config, train, train_several
from trainer.checkpoint.record import read_header, write_tensors
from trainer.config_file import load
from trainer.model.topoflow import TopoFlow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, tiny_scan: ScanCache) -> Path:
    return tiny_config(tmp_path_factory.mktemp("import"), tiny_path)


def test_import_trains_from_the_file_and_the_gate_knows_its_loss(config: Path) -> None:
    torch.manual_seed(99)
    run = load(config)
    old = TopoFlow(run.architecture())
    with torch.no_grad():  # far from a new network, so that its loss tells them apart
        for parameter in old.head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    file = config.parent / "old.ckpt"
    torch.save({"state_dict": {f"model.climax.{k}": v for k, v in old.state_dict().items()}}, file)
    weights = config.parent / "weights"
    done = module("trainer", "import", "--from", str(file), "--to", str(weights), "--config", str(config))
    assert done.returncode == 0, done.stderr
    assert "100.0000 %" in done.stdout
    losses = []
    for source in (file, weights):
        folder = config.parent / f"from-{source.name}"
        started = train(config, f"run_dir={folder}", f"init_from.path={source}", "steps=1", "schedule.warmup_steps=0", zero="2")
        assert started.returncode == 0, started.stderr[-3000:]
        assert json.loads((folder / "import.json").read_text())["share_loaded"] == 1.0
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append(rows[0]["loss"])
    assert losses[0] == losses[1]
    gate = [
        f"init_from.path={file}",
        f"expect={{val_loss: {losses[0]}, tolerance: 0.001}}",
        "steps=1",
        "schedule.warmup_steps=0",
    ]
    assert train(config, f"run_dir={config.parent}/gate", *gate).returncode == 0


@pytest.fixture(scope="module")
def recorded(config: Path) -> tuple[Path, float]:
    """Weights that a run has trained, with what was recorded beside them; a strong bias, so that it can be missed."""
    folder = config.parent / "recorded"
    done = train(config, f"run_dir={folder}", "model.alpha_init=40.0", "steps=20", "optimizer.lr=4e-3")
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = folder / "checkpoints/latest"
    return checkpoint, manifest(checkpoint)["progress"]["val_loss"]


def gate(config: Path, recorded: tuple[Path, float], *changes: str) -> str:
    """Start from the recorded weights with changes; what the gate says, or nothing."""
    checkpoint, val_loss = recorded
    folder = config.parent / f"gate{abs(hash(changes))}"
    given = [] if "init_from=null" in changes else [f"init_from.path={checkpoint}"]
    done = module(
        "trainer",
        "train",
        "--config",
        str(config),
        f"run_dir={folder}",
        "steps=1",
        "schedule.warmup_steps=0",
        *given,
        f"expect={{val_loss: {val_loss}, tolerance: 1.0e-5}}",
        *changes,
    )
    if done.returncode == 0:
        return ""
    assert "Traceback" not in done.stderr
    return done.stderr[done.stderr.index("error:") :]


def fitting(message: str) -> list[str]:
    return [line for line in message.splitlines() if "THIS FITS" in line]


def test_the_gate_lets_the_recorded_loss_pass(config: Path, recorded: tuple[Path, float]) -> None:
    assert gate(config, recorded, "model.alpha_init=40.0") == ""


def test_f08_the_gate_names_weights_that_were_never_loaded(config: Path, recorded: tuple[Path, float]) -> None:
    """val 0.964 at the first validation after hours in the queue: nobody had checked the starting loss."""
    said = fitting(gate(config, recorded, "init_from=null"))
    assert "weights not loaded: init_from is not set" in said[0]


def test_f08_the_gate_names_another_cache(config: Path, recorded: tuple[Path, float], tiny_path: Path, tmp_path: Path) -> None:
    """Two wind caches, one loss: the orders recorded with the weights are not the ones that were opened."""
    done = module("data", "wind-scan", str(tiny_path), "--out", str(tmp_path / "other"), "--regions", "2", "2")
    assert done.returncode == 0, done.stderr
    said = fitting(gate(config, recorded, f"wind_scan.cache={tmp_path}/other"))
    assert len(said) == 1
    assert "another wind-scan cache: orders" in said[0]


def test_f08_the_gate_names_a_scan_or_a_bias_that_the_weights_were_not_trained_with(
    config: Path, recorded: tuple[Path, float]
) -> None:
    """The weights were trained with a regional scan; the run scans globally."""
    refused = gate(config, recorded, "wind_scan.mode=global")
    assert "wind_scan.mode: regional recorded, global here" in refused
    said = fitting(gate(config, recorded, "wind_scan.mode=global", "init_from.allow_change=[wind_scan.mode]"))
    assert any("with wind_scan.mode regional the loss is" in line for line in said)


def test_f08_the_gate_names_other_statistics_and_a_bias_that_cannot_act(
    config: Path, recorded: tuple[Path, float], tmp_path: Path
) -> None:
    """Weights with alpha 0, and a record that says they were trained with another mean of pm25."""
    weights, record = load_file(recorded[0] / "weights.safetensors"), read_header(recorded[0] / "weights.safetensors")
    assert record is not None
    weights["blocks.0.attn.elevation_alpha"].zero_()
    record.statistics["pm25"]["mean"] += 1.0
    write_tensors(tmp_path / "weights.safetensors", weights, record)
    said = gate(config, (tmp_path, 9.0))
    assert fitting(said) == ["  - other statistics: ['pm25'] differ. THIS FITS"]
    assert re.search(r"without the elevation bias the loss is [0-9.]+: it cannot act", said)


def test_which_cache_names_the_one_that_reproduces_the_loss(
    config: Path, recorded: tuple[Path, float], tiny_path: Path, tiny_scan: ScanCache, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert module("data", "wind-scan", str(tiny_path), "--out", str(other), "--regions", "2", "2").returncode == 0
    command = ["trainer", "which-cache", "--checkpoint", str(recorded[0]), "--config", str(config), "--tolerance", "1e-5"]
    done = module(*command, "--caches", str(other), str(tiny_scan.path))
    assert done.returncode == 0, done.stderr
    assert f"{tiny_scan.path} reproduces the recorded loss" in done.stdout
    done = module(*command, "--caches", str(other))
    assert done.returncode == 2
    assert "none of these caches reproduces" in done.stderr


@pytest.mark.slow
def test_the_file_is_read_once_for_the_whole_job(config: Path, tmp_path: Path) -> None:
    """Bytes from storage, of all ranks together, with the file evicted from the page cache before each job."""
    wide = load(config, ["model.width=128"])
    torch.manual_seed(0)
    file = tmp_path / "weights.safetensors"
    save_file(TopoFlow(wide.architecture()).state_dict(), file)
    size = file.stat().st_size
    for ranks in (1, 2, 4):
        overrides = [
            f"run_dir={tmp_path}/{ranks}",
            "model.width=128",
            "steps=1",
            "schedule.warmup_steps=0",
            f"init_from.path={file}",
        ]
        done = train_several(config, [{"overrides": overrides, "count_reads": str(file)}], ranks=ranks)
        read = {int(r): int(n) for r, n in re.findall(r"rank (\d+) read (\d+) bytes", done.stdout)}
        assert len(read) == ranks
        print(f"{ranks} rank(s), file of {size} bytes, read from storage: {read}")
        if not any(read.values()):
            pytest.skip("this file system does not count what is read from it")
        assert 0.95 * size <= sum(read.values()) <= 1.5 * size
        assert all(n < 0.05 * size for rank, n in read.items() if rank)


def test_bf16_imports_keep_the_full_precision_of_the_file(config: Path) -> None:
    torch.manual_seed(98)
    state = TopoFlow(load(config).architecture()).state_dict()
    torch.save(state, config.parent / "full.pt")
    run = config.parent / "bf16"
    # A rate of nearly zero: the masters that are saved are the ones that were imported.
    done = train(
        config,
        f"run_dir={run}",
        f"init_from.path={config.parent}/full.pt",
        "precision=bf16",
        "steps=1",
        "schedule.warmup_steps=0",
        "optimizer.lr=1e-30",
        "optimizer.alpha_lr=1e-30",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    saved = load_file(run / "checkpoints/latest/weights.safetensors")
    assert all(torch.allclose(saved[name], value, rtol=0.0, atol=1e-20) for name, value in state.items())


def test_incomplete_weights_stop_every_rank_before_training(config: Path) -> None:
    state = {k: v for k, v in TopoFlow(load(config).architecture()).state_dict().items() if k != "norm.weight"}
    torch.save(state, config.parent / "incomplete.pt")
    done = train(config, f"run_dir={config.parent}/never", f"init_from.path={config.parent}/incomplete.pt")
    assert done.returncode != 0
    assert "missing norm.weight" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (config.parent / "never" / "checkpoints").exists()


@pytest.mark.slow
def test_exports_come_back_to_the_bit(config: Path) -> None:
    run = config.parent / "exported"
    done = train(config, f"run_dir={run}", "steps=4")
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = run / "checkpoints" / "latest"
    original = load_file(checkpoint / "weights.safetensors")
    for name in ("model.safetensors", "old_names.ckpt"):
        out = config.parent / name
        assert module("trainer", "checkpoint", "export", str(checkpoint), "--to", str(out)).returncode == 0
        back = config.parent / f"back-{name}"
        assert module("trainer", "import", "--from", str(out), "--to", str(back), "--config", str(config)).returncode == 0
        again = load_file(back / "weights.safetensors")
        for key, value in again.items():
            assert torch.equal(value, original[key].view_as(value)), key
    about = read_header(config.parent / "model.safetensors")
    assert about is not None
    assert (about.step, about.which) == (4, "as trained")
