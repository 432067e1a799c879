"""Weights that lost their description, or were not those that were meant: each ended with exit code 0."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data import DataError
from data.store.layout import Store
from data.variables import MODEL_INPUTS, MODEL_TARGETS
from data.wind_scan.cache import ScanCache
from tests.importing import import_weights, run_of
from tests.launching import manifest, ranks_of, tiny_config, train
from tests.unit.test_model import SMALL, arguments, randomised
from trainer import load_forecaster
from trainer.__main__ import main
from trainer.checkpoint.manifest import CheckpointError
from trainer.checkpoint.record import Record, read_header, write_tensors
from trainer.config import InitFrom
from trainer.config_file import dump
from trainer.forecaster import forecast
from trainer.forecaster import load_forecaster as load_with_store
from trainer.model.topoflow import TopoFlow
from trainer.weights.fit import network_of
from trainer.weights.reading import read

TURNED = list(MODEL_INPUTS[::-1])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, tiny_scan: ScanCache) -> Path:
    return tiny_config(tmp_path_factory.mktemp("description"), tiny_path)


@pytest.fixture(scope="module")
def averaged(config: Path) -> Path:
    """A run with a running mean, its rate so high that the mean is another network, and two checkpoints."""
    folder = config.parent / "averaged"
    done = train(config, f"run_dir={folder}", "steps=8", "checkpoint.every=4", "ema=0.9", "optimizer.lr=1e-2", ranks=1)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def turned(network: TopoFlow, tensors: dict[str, Tensor], file_order: list[str]) -> bool:
    """Whether the network with these weights computes of fields in MODEL_INPUTS' order what it did of the file's order."""
    given = arguments(SMALL, dtype=torch.float32)
    places = tuple(file_order.index(name) for name in MODEL_TARGETS)
    original = TopoFlow(replace(SMALL, target_channels=places)).eval()
    original.load_state_dict(network.state_dict())
    before = original(given[0][:, [MODEL_INPUTS.index(name) for name in file_order]], *given[1:])
    other = TopoFlow(SMALL).eval()
    other.load_state_dict(other.state_dict() | tensors)
    return torch.allclose(other(*given), before, rtol=1e-5, atol=1e-5)


def test_f70_the_order_that_a_file_names_is_believed_and_one_that_nobody_names_is_asked_for(tmp_path: Path) -> None:
    """Channels were taken in the published order wherever there were 15: off by 59, or permuted twice, exit 0."""
    network = randomised(SMALL, dtype=torch.float32).eval()
    state = {f"net.{name}": tensor for name, tensor in network.state_dict().items()}
    tellings: list[dict[str, Any]] = [
        {"hyper_parameters": {"variables": TURNED}},
        {"hyper_parameters": Namespace(net=Namespace(default_vars=tuple(TURNED), num_heads=3))},
        {"config": {"data": {"in_variables": [name.upper() for name in TURNED], "out_variables": ["pm25"]}}},
    ]
    for telling in tellings:
        torch.save({"state_dict": state} | telling, tmp_path / "file.ckpt")
        tensors, report = import_weights(TopoFlow(SMALL), tmp_path / "file.ckpt")
        report.refuse_unless_complete()
        with torch.no_grad():
            assert turned(network, tensors, TURNED)
    torch.save({"state_dict": state}, tmp_path / "file.ckpt")
    run = run_of(SMALL, data={"store": "/nowhere.zarr", "inputs": TURNED})
    with pytest.raises(CheckpointError, match="does not say in which order its 15 channels are"):
        network_of(read(tmp_path / "file.ckpt"), run)
    source = InitFrom(path=tmp_path / "file.ckpt", channels="configured")
    assert "the order of channels" in network_of(read(source.path), run, source)[1].notes[0]
    torch.save({"state_dict": state, "hyper_parameters": {"num_heads": 6}}, tmp_path / "heads.ckpt")
    with pytest.raises(CheckpointError, match=r"model\.heads: 6 recorded, 3 here"):
        import_weights(TopoFlow(SMALL), tmp_path / "heads.ckpt")[1].refuse_unless_complete()


def test_f70_an_old_or_a_stranger_s_record_beside_weights_is_never_found(tmp_path: Path) -> None:
    """An export over an older one had the older one's JSON beside it; an import left a stranger's manifest there."""
    run = run_of(SMALL, data={"store": "/nowhere.zarr", "inputs": TURNED})
    file = tmp_path / "model.safetensors"
    write_tensors(file, randomised(SMALL, dtype=torch.float32).state_dict(), Record(config=run.model_dump(mode="json")))
    file.with_suffix(".json").write_text(json.dumps({"config": run_of(SMALL).model_dump(mode="json"), "step": 3}))
    record = read(file).record
    assert record is not None
    assert record.config["data"]["inputs"] == TURNED
    (tmp_path / "run.yaml").write_text(dump(run))
    command = ["import", "--from", str(file), "--config", str(tmp_path / "run.yaml"), "--to"]
    assert main([*command, str(tmp_path / "out")]) == 0
    (tmp_path / "out/manifest.json").write_text("{}")
    assert main([*command, str(tmp_path / "out")]) == 2
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not what was saved"):
        read(file)


def test_f70_overrides_of_an_evaluation_find_channels_by_name_or_are_refused(averaged: Path) -> None:
    """`evaluate RUN data.inputs=...` put weights of one variable on another."""
    plain = load_with_store(averaged)
    mixed = load_with_store(averaged, overrides=[f"data.inputs={TURNED}".replace("'", "")])
    (_, ours), (_, theirs) = (forecast(each, 100, [6, 12]) for each in (plain, mixed))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    with pytest.raises(CheckpointError, match=r"model\.heads: 4 recorded, 8 here"):
        load_with_store(averaged, overrides=["model.heads=8"])


def test_f71_damaged_weights_are_used_by_nobody(averaged: Path, tmp_path: Path, tiny: Store) -> None:
    """Scores of rotten weights, a NetCDF of infinities, exit 0: only training looked at the hashes."""
    run = Path(shutil.copytree(averaged, tmp_path / "run"))
    newest = run / "checkpoints/step-00000008"
    file = newest / "weights.safetensors"
    content = bytearray(file.read_bytes())
    for at in range(len(content) - 400, len(content), 4):
        content[at + 3] ^= 0x80
    file.write_bytes(content)
    readers = {
        "evaluate": lambda: load_with_store(run),
        "script": lambda: load_forecaster(run),
        "init_from": lambda: read(run),
        "checkpoint": lambda: read(newest),
        "export": lambda: main(["checkpoint", "export", str(newest), "--to", str(tmp_path / "x.safetensors")]),
    }
    for name, reader in readers.items():
        if name == "export":
            assert reader() == 2
            continue
        with pytest.raises(CheckpointError, match="weights.safetensors is damaged") as refused:
            reader()
        assert ("whole one is" in str(refused.value)) == (name != "checkpoint")
    assert load_with_store(run, checkpoint=run / "checkpoints/step-00000004").manifest.step == 4
    overflowing = load_with_store(run, checkpoint=run / "checkpoints/step-00000004")
    with torch.no_grad():
        overflowing.model.norm.weight.mul_(torch.inf)
    with pytest.raises(DataError, match="is not finite"):
        forecast(overflowing, 100, [6, 12])


def test_f72_of_two_sets_of_weights_the_one_that_was_scored_is_taken_and_said(
    averaged: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """init_from and import of a run with `ema` took the raw weights, whose loss nobody had measured."""
    checkpoint = averaged / "checkpoints/latest"
    state, raw = (load_file(checkpoint / f"{name}.safetensors") for name in ("optimizer", "weights"))
    for options, truth in (([], state["norm.weight.ema"]), (["--raw"], raw["norm.weight"])):
        command = ["import", "--from", str(checkpoint), "--to", str(tmp_path / "i"), "--config", str(config)]
        assert main([*command, *options]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert ("weights taken: 'as trained'" in said) == bool(options)
        assert torch.equal(load_file(tmp_path / "i/weights.safetensors")["norm.weight"], truth)
        record = read_header(tmp_path / "i/weights.safetensors")
        assert record is not None
        assert record.val_loss == (None if options else manifest(checkpoint)["progress"]["val_loss"])
    own = randomised(SMALL, dtype=torch.float32).state_dict()
    torch.save({"student": own, "second": own}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match="several sets of weights: 'student', 'second'"):
        read(tmp_path / "two.pt")
    assert read(tmp_path / "two.pt", take="second").also == ["student"]


@pytest.mark.parametrize("stage", ["1", "3"])
def test_f73_shards_of_two_saves_are_never_merged(config: Path, tmp_path: Path, stage: str) -> None:
    """Rank 0's shard of step 6 and rank 1's of step 2 became one network, exit 0."""
    done = ranks_of(["tests/distributed/shards.py", str(config), stage, str(tmp_path)], 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read(tmp_path / "at6").tensors["pos_embed"].shape == (1, 128, 32)
    of_rank_1 = [file.name for file in (tmp_path / "at2/checkpoint").glob("*pp_rank_1*optim*")]
    of_model = [file.name for file in (tmp_path / "at2/checkpoint").glob("*model_states*")]
    for name, files in (("mixed", of_rank_1), ("older", of_model)):
        shutil.copytree(tmp_path / "at6", tmp_path / name)
        for file in files:
            shutil.copy(tmp_path / "at2/checkpoint" / file, tmp_path / name / "checkpoint" / file)
        if stage == "3" and name == "older":
            continue  # its model's states hold no weights, and say the step of the optimizer's no more
        with pytest.raises(CheckpointError, match="are not of one save"):
            read(tmp_path / name)


def sharded(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir()
    names = sorted(state)
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: state[name].contiguous() for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def merged(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def written(file: Path, content: Any) -> Path:
    torch.save(content, file)
    return file


def inside(state: dict[str, Tensor], wrapper: str) -> dict[str, Tensor]:
    names = {name: name.split(".") for name in state}
    return {
        ".".join([*parts[:2], wrapper, *parts[2:]]) if parts[0] == "blocks" else name: state[name]
        for name, parts in names.items()
    }


FORMATS: dict[str, Any] = {
    "compiled blocks": lambda d, s: written(d / "a.pt", {"state_dict": inside(s, "_orig_mod")}),
    "FSDP": lambda d, s: written(d / "a.pt", inside(s, "_fsdp_wrapped_module")),
    "ema-pytorch": lambda d, s: written(
        d / "a.pt",
        {
            "initted": torch.tensor(True),
            "step": torch.tensor(9),
            **{f"online_model.{k}": v for k, v in s.items()},
            **{f"ema_model.{k}": v for k, v in s.items()},
        },
    ),
    "averaged model": lambda d, s: written(
        d / "a.pt", {"n_averaged": torch.tensor(3)} | {f"module.{k}": v for k, v in s.items()}
    ),
    "averaging of Lightning": lambda d, s: written(
        d / "a.ckpt", {"state_dict": s, "current_model_state": {k: v + 1 for k, v in s.items()}}
    ),
    "another key": lambda d, s: written(d / "a.pt", {"generator": s, "epoch": 3}),
    "shards with an index": lambda d, s: sharded(d / "sharded", s),
    "merged by zero_to_fp32": lambda d, s: merged(d / "merged", s),
    "H_scale of one element": lambda d, s: written(d / "a.pt", s | {"blocks.0.attn.H_scale": torch.tensor([1000.0])}),
    "H_scale alone": lambda d, s: written(d / "a.pt", s | {"H_scale": torch.tensor(1000.0)}),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_f78_weights_load_as_other_trainers_leave_them(kind: str, tmp_path: Path) -> None:
    """They were refused with a list of missing names, or "is not a checkpoint directory", and no remedy."""
    state = randomised(SMALL, seed=3, dtype=torch.float32).state_dict()
    tensors, report = import_weights(TopoFlow(SMALL), FORMATS[kind](tmp_path, state))
    report.refuse_unless_complete()
    assert all(torch.equal(tensors[name], state[name].view_as(tensors[name])) for name in tensors)


def test_f78_what_cannot_be_loaded_names_a_remedy_and_exports_load_in_lightning(averaged: Path, tmp_path: Path) -> None:
    """A distributed checkpoint had no remedy; Lightning's loader asked for a key that the export did not have."""
    folder = tmp_path / "dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"pickled")
    with pytest.raises(CheckpointError, match="dcp_to_torch"):
        read(folder)
    file = tmp_path / "old.ckpt"
    assert main(["checkpoint", "export", str(averaged), "--to", str(file)]) == 0
    content = torch.load(file, weights_only=True)
    assert {"state_dict", "pytorch-lightning_version", "epoch", "global_step", "loops"} <= content.keys()
