"""Import over real ranks: read once, broadcast, compared; and the step-0 gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.wind_scan import ScanCache
from tests.launching import module, tiny_config, train
from trainer.config import load
from trainer.inputs import architecture
from trainer.model.topoflow import TopoFlow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, tiny_scan: ScanCache) -> Path:
    return tiny_config(tmp_path_factory.mktemp("import"), tiny_path)


def test_import_trains_from_the_file_and_the_gate_knows_its_loss(config: Path) -> None:
    torch.manual_seed(99)
    run = load(config)
    old = TopoFlow(architecture(run))
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
    other = train(config, f"run_dir={config.parent}/gate2", *gate, "init_from=null", "seed=17")
    assert "usual causes" in other.stderr.lower()


def test_bf16_imports_keep_the_full_precision_of_the_file(config: Path) -> None:
    torch.manual_seed(98)
    state = TopoFlow(architecture(load(config))).state_dict()
    torch.save(state, config.parent / "full.pt")
    run = config.parent / "bf16"
    # A rate of nearly zero: the masters that are saved are the ones that were imported.
    done = train(config, f"run_dir={run}", f"init_from.path={config.parent}/full.pt", "precision=bf16", "steps=1",
                 "schedule.warmup_steps=0", "optimizer.lr=1e-30", "optimizer.alpha_lr=1e-30")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    saved = load_file(run / "checkpoints/latest/weights.safetensors")
    assert all(torch.allclose(saved[name], value, rtol=0.0, atol=1e-20) for name, value in state.items())


def test_incomplete_weights_stop_every_rank_before_training(config: Path) -> None:
    state = {k: v for k, v in TopoFlow(architecture(load(config))).state_dict().items() if k != "norm.weight"}
    torch.save(state, config.parent / "incomplete.pt")
    done = train(config, f"run_dir={config.parent}/never", f"init_from.path={config.parent}/incomplete.pt")
    assert done.returncode != 0
    assert "missing norm.weight" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (config.parent / "never" / "checkpoints").exists()


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
    about = json.loads((config.parent / "model.json").read_text())
    assert about["units"]["pm25"] == "ug m-3"
    assert about["step"] == 4
