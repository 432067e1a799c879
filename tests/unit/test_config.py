"""A configuration is right as a whole or refused with what is wrong and what was meant."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from pydantic import BaseModel

from tests.launching import ROOT
from trainer.config import ConfigError, Run
from trainer.config_file import dump, load, validate
from trainer.engine import learning_rate, resolve_deepspeed

CHINA = ROOT / "launch" / "configs" / "china_128x256.yaml"
DEMO = ROOT / "launch" / "configs" / "demo.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configurations_are_valid_and_come_back_from_their_dump(path: Path, tmp_path: Path) -> None:
    run = load(path)
    (tmp_path / "again.yaml").write_text(dump(run))
    assert load(tmp_path / "again.yaml") == run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lerning_rate=1e-3", "optimizer.lerning_rate: unknown key; did you mean 'optimizer.lr'?"),
        ("optimizer.lrr=1e-3", "optimizer.lrr: unknown key; did you mean 'optimizer.lr'?"),
        ("bach.total=8", "bach: unknown key; did you mean 'batch'?"),
        ("expect.val_los=1", "expect.val_los: unknown key; did you mean 'expect.val_loss'?"),
        ("steps=0", "steps: Input should be greater than or equal to 1"),
        ("optimizer.lr=fast", "optimizer.lr: Input should be a valid number"),
        ("data.targets=[pm25, pm25]", "listed twice"),
        ("data.inputs=[u, v, pm25]", "must also be inputs"),
        ("data.targets=[temp]", "are not pollutants"),
        ("wind_scan.cache=a", "wind_scan.cache is not read when wind_scan.mode is none"),
        ("wind_scan.mode=regional", "needs wind_scan.cache"),
        ("model.width=90", "must be divisible by heads"),
        ("model.grid=[33, 64]", "not a whole number of 2 x 2 patches"),
        ("schedule.warmup_steps=5000", "must be less than the schedule's length"),
        ("steps", "not of the form key=value"),
        ("seed.x=1", "'seed' is a value, not a section"),
    ],
)
def test_wrong_values_are_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(DEMO, [override])
    assert message in str(caught.value)


def test_misspelt_synonym_is_answered_with_our_name() -> None:
    tree = json.loads(load(DEMO).model_dump_json()) | {"lerning_rate": 1e-3}
    with pytest.raises(ConfigError, match="lerning_rate: unknown key; did you mean 'optimizer.lr'"):
        validate(tree, source="test")


@pytest.mark.parametrize("inert", ["alpha_init=0.0", "bias_floor=-1.0", "elevation_as_given=true"])
def test_settings_of_a_bias_that_is_off_are_refused(inert: str) -> None:
    with pytest.raises(ConfigError, match=f"{inert.partition('=')[0]} is not read"):
        load(DEMO, ["model.elevation_bias=none", f"model.{inert}"])


@pytest.mark.parametrize(
    ("written", "meant"), [("true", "descent"), ("false", "none"), ("climb", "climb"), ("descent", "descent"), ("none", "none")]
)
def test_the_elevation_bias_has_a_direction(written: str, meant: str) -> None:
    """Configurations and manifests of before it had one say true or false."""
    run = load(DEMO, [f"model.elevation_bias={written}"])
    assert (run.model.elevation_bias, run.architecture().elevation_bias) == (meant, meant)


def test_a_network_of_old_code_is_asked_for_what_it_reads() -> None:
    for mode in ("legacy", "release"):
        with pytest.raises(ConfigError, match=f"wind_scan.mode {mode} is for networks of the old code"):
            load(DEMO, [f"wind_scan={{mode: {mode}}}"])
    with pytest.raises(ConfigError, match="remove it"):
        load(CHINA, ["wind_scan={mode: legacy}", "model.bias_floor=-5.0"])
    keys = ["model.elevation_bias=climb", "model.elevation_as_given=true"]
    with pytest.raises(ConfigError, match="add it to data.inputs"):
        load(DEMO, [*keys, "data.inputs=[u, v, pm25, pm10, so2, no2, co, o3]"])


def test_absent_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration at"):
        load(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load(tmp_path / "empty.yaml", ["steps=3"])
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(tmp_path / "bad.yaml")


def test_f17_every_key_of_the_tree_is_read_by_the_code() -> None:
    """A key that nothing reads (dead warm-up, scheduler, save_last) cannot exist: each field is an attribute access."""
    read: set[object] = set()
    for path in [*(ROOT / "trainer").rglob("*.py"), *(ROOT / "data").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "enter":
                read |= {phase.value for phase in node.args if isinstance(phase, ast.Constant)}  # deadlines of `watch`

    def fields(section: type[BaseModel]) -> set[str]:
        found = set()
        for name, field in section.model_fields.items():
            found.add(name)
            annotation = field.annotation
            for candidate in (annotation, *getattr(annotation, "__args__", ())):
                if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                    found |= fields(candidate)
        return found

    assert fields(Run) - read == set()


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_global_batch_is_micro_times_accumulation_times_world(world: int, accumulation: int) -> None:
    run = load(DEMO, ["batch.total=16", "batch.micro=4"])
    assert run.batch.accumulation(world) == accumulation


def test_global_batch_that_does_not_divide_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Nearest possible: batch.total=12 or 24"):
        load(DEMO, ["batch.total=16", "batch.micro=4"]).batch.accumulation(3)


def test_f18_learning_rate_is_a_function_of_the_step_alone() -> None:
    run = load(DEMO, ["steps=100", "schedule.warmup_steps=10", "schedule.final_lr=0.1"])
    rates = [learning_rate(2.0, step, run.steps, run.schedule) for step in range(120)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2.0) == max(rates)
    assert rates[55] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[100:] == pytest.approx([0.2] * 20)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.name)
def test_deepspeed_files_are_filled_from_the_run(path: Path) -> None:
    run = load(DEMO, ["batch.total=16", "batch.micro=4", "precision=bf16"])
    filled = resolve_deepspeed(path, run, world_size=2)
    assert "auto" not in json.dumps(filled)
    assert filled["train_batch_size"] == 16
    assert filled["gradient_accumulation_steps"] == 2
    assert filled["bf16"]["enabled"] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'"),
        ({"optimizer": {"type": "Adam"}}, "'optimizer' is not read"),
        ({"train_batch_size": 64}, "train_batch_size=64 contradicts the run's 8"),
        ({"bf16": {"enabled": True}}, "contradicts precision=fp32"),
    ],
)
def test_deepspeed_files_that_would_not_act_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(json.loads((ROOT / "ds_configs/zero1.json").read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        resolve_deepspeed(path, load(DEMO), world_size=2)
