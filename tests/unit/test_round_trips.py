"""Weights go round: from a run to an export, an import, another run and out again, and stay the same function.

Truth is the network that the weights come from, asked by the names of its channels and targets. Where
the other end means something else by the same shapes, the way must be refused by that name.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from data import Refusal
from data.variables import MODEL_INPUTS, MODEL_TARGETS
from trainer.__main__ import main
from trainer.checkpoint.consistency import hash_tensors
from trainer.checkpoint.manifest import FileRecord, Manifest, Memory, Progress, sha256_of, write
from trainer.checkpoint.record import MEAN, TRAINED, of_run, write_tensors
from trainer.commands.checkpoint import export
from trainer.config import InitFrom, Run
from trainer.config_file import dump
from trainer.model.topoflow import TopoFlow
from trainer.weights.fit import network_of
from trainer.weights.reading import wanted

WAYS = 2000 if os.environ.get("TOPOFLOW_ALL_WAYS") else 40
SHAPE = (8, 8)
MEANT = ("model.elevation_bias", "model.heads", "model.predict", "model.grid", "data.transform")


@dataclass(frozen=True)
class Way:
    """A run, where its weights go, and what the run there means otherwise."""

    inputs: list[str]
    targets: list[str]
    leads: list[int]
    model: dict[str, Any]
    ema: bool
    frozen: bool
    raw: bool
    other_inputs: list[str]
    other_targets: list[str]
    other_leads: list[int]
    changed: str  # one of MEANT, or nothing
    suffix: str  # of the export


@st.composite
def ways(draw: st.DrawFn) -> Way:
    targets = draw(st.lists(st.sampled_from(MODEL_TARGETS), min_size=1, max_size=3, unique=True))
    others = [name for name in MODEL_INPUTS if name not in targets and name not in ("u", "v", "elevation")]
    chosen = draw(st.lists(st.sampled_from(others), max_size=4, unique=True))
    inputs = draw(st.permutations(["u", "v", "elevation", *targets, *chosen]))
    leads = draw(st.lists(st.sampled_from([6, 12, 24, 48]), min_size=1, max_size=3, unique=True))
    bias = draw(st.sampled_from(["none", "descent", "climb"]))
    predict = draw(st.sampled_from(["state", "change"]))
    return Way(
        inputs,
        targets,
        leads,
        {"elevation_bias": bias, "predict": predict},
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.permutations(inputs)),
        draw(st.permutations(targets)),
        draw(st.permutations(leads)),
        draw(st.sampled_from(["", "", *MEANT])),
        draw(st.sampled_from([".safetensors", ".ckpt"])),
    )


def run_of(folder: Path, inputs: list[str], targets: list[str], leads: list[int], **more: Any) -> Run:
    model = {"grid": SHAPE, "width": 16, "depth": 1, "heads": 2, "dropout": 0.0, "drop_path": 0.0}
    tree = {
        "run_dir": str(folder),
        "steps": 5,
        "data": {"store": "/nowhere.zarr", "inputs": inputs, "targets": targets, "lead_hours": leads},
        "model": model | more.pop("model", {}),
    }
    data = more.pop("data", {})
    tree["data"] |= data
    return Run.model_validate(tree | more)


def randomised(run: Run, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    network = TopoFlow(run.architecture())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def checkpoint_of(run: Run, weights: dict[str, Tensor], means: dict[str, Tensor]) -> Path:
    """As a run writes it, after 5 steps."""
    folder = run.run_dir / "checkpoints/step-00000005"
    folder.mkdir(parents=True)
    memory = Memory(
        progress=Progress(step=5, val_loss=0.5, val_step=5),
        config=run.model_dump(mode="json"),
        deepspeed={},
        fingerprints={"data": "a", "wind_scan_orders": "none"},
        statistics={},
        parameters={},
        world_size=1,
        zero_stage=0,
        version="0",
    )
    files = {"weights.safetensors": weights, "optimizer.safetensors": means}
    for name, tensors in files.items():
        record = of_run(memory, TRAINED) if name.startswith("weights") else None
        write_tensors(folder / name, tensors, record)
    described = {name: FileRecord(bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name)) for name in files}
    hashes = hash_tensors((weights | means).items())
    write(Manifest(**dict(memory), format=2, files=described, tensors=hashes), folder / "manifest.json")
    return folder


def forecast(run: Run, network: TopoFlow, fields: dict[str, Tensor]) -> dict[tuple[str, int], Tensor]:
    """(target, lead time) -> forecast of the same fields, whatever the order of channels; in float64."""
    network.double().eval()
    x = torch.stack([fields[name] for name in run.data.inputs])[None]
    elevation = torch.linspace(0.0, 3000.0, 16, dtype=torch.float64)
    found = {}
    for lead in run.data.lead_hours:
        departure = None
        if run.model.predict == "change":
            planes = [torch.stack([fields[f"{name} {kind}"] for name in run.data.targets]) for kind in ("now", "then")]
            departure = torch.stack(planes)[None]
        with torch.no_grad():
            out = network(x, torch.tensor([float(lead)], dtype=torch.float64), elevation, torch.arange(16)[None], departure)
        found |= {(name, lead): out[0, place] for place, name in enumerate(run.data.targets)}
    return found


def other_end(way: Way, folder: Path) -> Run:
    model, data = dict(way.model), {}
    if way.changed == "model.elevation_bias":
        model["elevation_bias"] = {"descent": "climb", "climb": "descent", "none": "none"}[model["elevation_bias"]]
    elif way.changed == "model.heads":
        model["heads"] = 4
    elif way.changed == "model.predict":
        model["predict"] = "state" if model["predict"] == "change" else "change"
    elif way.changed == "model.grid":
        model["grid"] = (4, 16)
    elif way.changed == "data.transform":
        data["transform"] = {way.targets[0]: "log1p"}
    return run_of(folder, way.other_inputs, way.other_targets, way.other_leads, model=model, data=data)


def meant_otherwise(way: Way) -> bool:
    return way.changed not in ("", "model.elevation_bias") or (
        way.changed == "model.elevation_bias" and way.model["elevation_bias"] != "none"
    )


@settings(max_examples=WAYS, deadline=None, suppress_health_check=list(HealthCheck))
@given(way=ways(), seed=st.integers(0, 1000))
def test_weights_go_round_as_the_same_function_or_are_refused_by_name(tmp_path_factory: Any, way: Way, seed: int) -> None:
    folder = Path(tmp_path_factory.mktemp("way"))
    more = {"ema": 0.9} if way.ema else {}
    more |= {"freeze": ["blocks.0.*"]} if way.frozen else {}
    run = run_of(folder / "run", way.inputs, way.targets, way.leads, model=way.model, **more)
    weights = randomised(run, seed)
    trained = [name for name in weights if not name.endswith("H_scale")]
    trained = [name for name in trained if not (way.frozen and name.startswith("blocks.0."))]
    means = {name: weights[name] + 0.1 for name in trained} if way.ema else {}
    kept = checkpoint_of(run, weights, {f"{name}.ema": mean for name, mean in means.items()})
    scored = weights | (means if way.ema and not way.raw else {})
    original = TopoFlow(run.architecture()).eval()
    original.load_state_dict(scored)
    file = folder / f"export{way.suffix}"
    if way.suffix == ".ckpt" and way.model["elevation_bias"] == "climb":
        file = file.with_suffix(".safetensors")
    export(kept if way.raw else run.run_dir, file, way.raw)
    other = other_end(way, folder / "other")
    config = folder / "other.yaml"
    config.write_text(dump(other))
    code = main(["import", "--from", str(file), "--to", str(folder / "imported"), "--config", str(config)])
    if meant_otherwise(way):
        assert code == 2
        for path in (file, kept):
            source = InitFrom(path=path, raw=way.raw)
            with pytest.raises(Refusal, match=re.escape(way.changed)):
                network_of(wanted(source), other, source)
        return
    assert code == 0
    generator = torch.Generator().manual_seed(seed)
    names = [*way.inputs, *(f"{name} {kind}" for name in way.targets for kind in ("now", "then"))]
    fields = {name: torch.randn(SHAPE, generator=generator, dtype=torch.float64) for name in names}
    truth = forecast(run, original, fields)
    ways_back = {"import": folder / "imported", "export": file, "checkpoint": kept}
    for name, path in ways_back.items():
        source = InitFrom(path=path, raw=way.raw)
        brought, report = network_of(wanted(source), other, source)
        assert report.share == 1.0
        for key, field in forecast(other, brought, fields).items():
            torch.testing.assert_close(field, truth[key], rtol=1e-6, atol=1e-6, msg=f"{name} {key}")
    out = folder / "again.safetensors"
    export(folder / "imported", out)
    record = wanted(InitFrom(path=out)).record
    assert record is not None
    assert record.which == (MEAN if way.ema and not way.raw else TRAINED)
    assert record.val_loss == (None if way.ema and way.raw else 0.5)
