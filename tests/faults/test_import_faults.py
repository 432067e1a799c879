"""Foreign weights load completely or not at all; files are never executed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.importing import import_weights, run_of
from tests.unit.test_model import SMALL, arguments, randomised
from trainer.checkpoint.manifest import CheckpointError
from trainer.checkpoint.record import Record, write_tensors
from trainer.commands import checkpoint
from trainer.model.topoflow import TopoFlow
from trainer.weights.report import ImportReport

BIAS = "blocks.0.attn.elevation_alpha"


def lightning(state: dict[str, Tensor]) -> dict:
    tensors = {f"model.climax.{k}": v for k, v in state.items()}
    tensors |= {"china_mask": torch.ones(128, 256), "model.target_indices": torch.arange(6)}
    return {"state_dict": tensors, "epoch": 3, "global_step": 100, "hyper_parameters": {"lr": 1e-4}}


def renamed(state: dict[str, Tensor], second: str) -> dict[str, Tensor]:
    return {
        k.replace("blocks.0.mlp.fc1", "blocks.0.mlp.0").replace("blocks.0.mlp.fc2", f"blocks.0.mlp.{second}"): v
        for k, v in state.items()
    }


def unstacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {k: v for k, v in state.items() if not k.startswith("token_embeds.")}
    for i in range(15):
        kept[f"net.token_embeds.{i}.proj.weight"] = state["token_embeds.proj_weights"][i]
        kept[f"net.token_embeds.{i}.proj.bias"] = state["token_embeds.proj_biases"][i]
    return {k if k.startswith("net.") else f"net.{k}": v for k, v in kept.items()}


def old_alpha(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        ("climax.blocks.0.attn.alpha" if k == BIAS else f"climax.{k}"): (v.view(1) if k == BIAS else v)
        for k, v in state.items()
    }


DIALECTS = {
    "lightning": lightning,
    "plain": dict,
    "mlp 0/2": lambda s: renamed(s, "2"),
    "mlp 0/3": lambda s: renamed(s, "3"),
    "alpha": old_alpha,
    "a projection a variable": unstacked,
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_same_forward_output(dialect: str, tmp_path: Path) -> None:
    original = randomised(SMALL, seed=1, dtype=torch.float32).eval()
    torch.save(DIALECTS[dialect](original.state_dict()), tmp_path / "old.ckpt")
    model = randomised(SMALL, seed=2, dtype=torch.float32).eval()
    tensors, report = import_weights(model, tmp_path / "old.ckpt", [])
    assert report.complete
    assert report.share == 1.0
    model.load_state_dict({**model.state_dict(), **tensors})
    given = arguments(SMALL, dtype=torch.float32)
    assert torch.equal(model(*given), original(*given))


def imported(state: dict, tmp_path: Path, allow: tuple[str, ...] = (), **arch: object) -> ImportReport:
    torch.save(state, tmp_path / "file.ckpt")
    return import_weights(TopoFlow(replace(SMALL, **arch)), tmp_path / "file.ckpt", list(allow))[1]


def test_f01_renamed_keys_are_listed_and_refused(tmp_path: Path) -> None:
    """strict=False hid renamed keys: 4,768,574 weights were random and the loss was 2.19 instead of 0.356."""
    state = randomised(SMALL).state_dict()
    state = {k.replace("blocks.1.mlp.fc1", "blocks.1.mlp.dense"): v for k, v in state.items()}
    report = imported(state, tmp_path)
    assert set(report.missing) == {"blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc1.bias"}
    assert set(report.unexpected) == {"blocks.1.mlp.dense.weight", "blocks.1.mlp.dense.bias"}
    assert report.share < 1.0
    with pytest.raises(CheckpointError, match=r"missing blocks\.1\.mlp\.fc1\.weight"):
        report.refuse_unless_complete()


def test_f01_only_the_allow_list_may_be_missing(tmp_path: Path) -> None:
    """A checkpoint of the baseline has no elevation_alpha; nothing else may be absent."""
    state = randomised(replace(SMALL, elevation_bias="none")).state_dict()
    with pytest.raises(CheckpointError, match="missing blocks.0.attn.elevation_alpha"):
        imported(state, tmp_path).refuse_unless_complete()
    report = imported(state, tmp_path, allow=("elevation_alpha",))
    report.refuse_unless_complete()
    assert report.allowed_missing == [BIAS]


@pytest.mark.parametrize(("learned", "wanted"), [("climb", "descent"), (True, "climb"), ("descent", "climb")])
def test_f01_an_alpha_of_the_other_direction_is_refused(tmp_path: Path, learned: str | bool, wanted: str) -> None:
    """One name for both: a barrier would become its opposite."""
    file, state = tmp_path / "export.safetensors", randomised(SMALL, dtype=torch.float32).state_dict()
    config = run_of(replace(SMALL, elevation_bias="descent" if learned is True else str(learned))).model_dump(mode="json")
    config["model"]["elevation_bias"] = learned
    write_tensors(file, state, Record(config=config))
    for bias, complete in ((wanted, False), ("descent" if wanted == "climb" else "climb", True)):
        _, report = import_weights(TopoFlow(replace(SMALL, elevation_bias=bias)), file)
        assert report.complete == complete
    network = TopoFlow(replace(SMALL, elevation_bias=wanted))
    with pytest.raises(CheckpointError, match=rf"model\.elevation_bias: .* recorded, {wanted} here"):
        import_weights(network, file)[1].refuse_unless_complete()
    _, report = import_weights(network, file, allow_change=["model.elevation_bias"])
    assert report.complete
    assert report.accepted


def test_f02_one_layer_head_is_refused_by_shape(tmp_path: Path) -> None:
    """A converter mapped head.0 (768 x 768) onto a (60 x 768) head: shape is part of the match."""
    state = {k: v for k, v in randomised(SMALL).state_dict().items() if not k.startswith("head.")}
    state |= {"head.0.weight": torch.zeros(60, 24), "head.0.bias": torch.zeros(60)}
    report = imported(state, tmp_path)
    assert report.misshapen["head.0.weight"] == "(60, 24) in the file, (24, 24) here"
    assert "head.2.weight" in report.missing
    with pytest.raises(CheckpointError):
        report.refuse_unless_complete()


@pytest.mark.parametrize("prefix", ["", "model.", "model.climax.", "net.", "module.net."])
def test_f06_prefix_is_inferred_and_everything_loads(prefix: str, tmp_path: Path) -> None:
    """A `model.` prefix: 0 of 92 tensors were loaded, without an error."""
    report = imported({prefix + k: v for k, v in randomised(SMALL).state_dict().items()}, tmp_path)
    assert report.complete
    assert len(report.loaded) == len(report.expected)


def test_f06_foreign_file_without_any_match_is_refused(tmp_path: Path) -> None:
    """Nothing in common: named as 0 % loaded."""
    with pytest.raises(CheckpointError, match=r"loads 0\.0000 %"):
        imported({"a.weight": torch.zeros(3), "b": torch.zeros(2, 2)}, tmp_path).refuse_unless_complete()


def test_f29_converting_block_0_leaves_the_other_blocks_alone(tmp_path: Path) -> None:
    """A key converter for block 0, by pattern and unchecked, broke blocks 1 to 5."""
    state = randomised(SMALL).state_dict()
    report = imported(renamed(state, "2"), tmp_path)
    assert report.complete
    assert set(report.remapped) == {f"blocks.0.mlp.{i}.{kind}" for i in "02" for kind in ("weight", "bias")}


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_that_runs_a_command_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    evidence = tmp_path / "executed"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": Malicious(f"touch {evidence}")}, tmp_path / "file.ckpt")
    with pytest.raises(CheckpointError, match="is not opened"):
        import_weights(TopoFlow(SMALL), tmp_path / "file.ckpt", [])
    assert not evidence.exists()


def test_truncated_and_empty_files_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    torch.save(3, tmp_path / "number.ckpt")
    for name, message in (
        ("cut.safetensors", "cannot be read"),
        ("number.ckpt", "no named tensors"),
        ("none.pt", "no weights at"),
    ):
        with pytest.raises(CheckpointError, match=message):
            import_weights(TopoFlow(SMALL), tmp_path / name, [])


def test_alpha_of_climb_is_not_exported_to_code_that_would_take_it_for_descent(tmp_path: Path) -> None:
    config = run_of(replace(SMALL, elevation_bias="climb")).model_dump(mode="json")
    file = tmp_path / "export.safetensors"
    write_tensors(file, randomised(SMALL, dtype=torch.float32).state_dict(), Record(config=config))
    with pytest.raises(CheckpointError, match=r"climb .*export to \.safetensors"):
        checkpoint.export(file, tmp_path / "old.ckpt")
    assert not (tmp_path / "old.ckpt").exists()
