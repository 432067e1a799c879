"""What starts without torch: help, refusals of a configuration, and commands that read a few small files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data.__main__ import COMMANDS as DATA
from tests.faults.test_checkpoint_faults import make
from tests.launching import ROOT, environment
from trainer.__main__ import COMMANDS as TRAINER

HEAVY = {"torch", "deepspeed", "xarray", "zarr", "matplotlib", "timm", "torchvision", "pandas", "dask", "scipy", "tensorboard"}
CONFIG = "launch/configs/demo.yaml"
EVALUATION = {
    "fingerprints": {}, "split": "test", "samples": 3, "period": ["a", "b"], "baseline": "persistence",
    "weather": "of the analysis", "step": 2,
    "scores": {"pm25": {"6h": {"units": "ug m-3", "rmse": 1.0, "skill": 0.1}}},
}  # fmt: skip


def loaded(*command: str, code: int = 0) -> set[str]:
    """Top-level modules that `python -m COMMAND` has imported when it ends."""
    importing = [sys.executable, "-X", "importtime", "-m", *command]
    done = subprocess.run(importing, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr[-2000:]
    rows = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(rows) > 20
    return {name.split(".")[0] for name in rows}


@pytest.mark.parametrize("package", ["trainer", "data"])
def test_the_list_of_commands_needs_nothing_that_is_not_python_s_own(package: str) -> None:
    assert loaded(package, "--help") & (HEAVY | {"numpy", "rich", "pydantic", "yaml"}) == set()


@pytest.mark.parametrize(("package", "command"), [("trainer", c) for c in TRAINER] + [("data", c) for c in DATA])
def test_help_of_a_command_is_light(package: str, command: str) -> None:
    assert loaded(package, *command.split(), "--help") & HEAVY == set()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    make(tmp_path, 4, 0.5)
    tree = yaml.safe_load((ROOT / CONFIG).read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "validation", "step": 4, "loss": 0.5}) + "\n")
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(EVALUATION))
    return tmp_path


@pytest.mark.parametrize("command", [
    ["status", "RUN"], ["compare", "RUN/a.json", "RUN/b.json"], ["checkpoint", "list", "RUN"],
    ["checkpoint", "verify", "RUN/checkpoints/step-00000004"], ["checkpoint", "show", "RUN/checkpoints/step-00000004"],
    ["plan", "--config", "launch/configs/china_128x256.yaml", "--gpus", "400", "--gpu", "h200", "data.store=/nowhere.zarr"],
], ids=" ".join)  # fmt: skip
def test_what_reads_a_few_files_is_light(command: list[str], run_dir: Path) -> None:
    assert loaded("trainer", *(word.replace("RUN", str(run_dir)) for word in command)) & HEAVY == set()


@pytest.mark.parametrize("command", ["train", "plan --gpus 2 --gpu h100"])
def test_a_wrong_configuration_is_refused_before_torch_is_imported(command: str) -> None:
    assert loaded("trainer", *command.split(), "--config", CONFIG, "batch.mikro=2", code=2) & HEAVY == set()


def test_a_rank_has_not_imported_what_only_rank_0_or_nobody_needs() -> None:
    code = "import sys, deepspeed, trainer.train; print(*{name.split('.')[0] for name in sys.modules} | set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    names = set(done.stdout.splitlines()[-1].split())
    unneeded = (HEAVY - {"torch", "deepspeed"}) | {"rich", "sympy", "shapely", "torch._dynamo", "torch._inductor"}
    assert names & unneeded == set()
