"""What looked right and was not: each of these once ended with exit code 0, and with wrong weights, moments or values."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import pytest
import scipy.sparse
import torch
import xarray as xr
from safetensors.torch import load_file, save_file
from torch import Tensor

from data import DataError
from data.prepare import beginning, stages
from data.prepare.catalogue.catalogue import Catalogue
from data.prepare.catalogue.search import make_catalogue
from data.prepare.fields import Reader
from data.prepare.grids.regrid import Regridder
from data.prepare.inputs import netcdf3
from data.prepare.plan import Plan
from data.prepare.sources.source import DEFAULT_CLOCK, Clock, Named, Source, known_fields, read_as
from data.prepare.stored import Stored, decoded
from data.process.ranks import LaunchError, World
from data.store import opening as stores
from data.strict import parse_json, parse_yaml
from data.wind_scan.cache import ScanCache
from tests.faults.test_checkpoint_faults import make, present
from tests.importing import import_weights, run_of
from tests.launching import ROOT, environment, losses, manifest, tiny_config, train_several
from tests.reanalysis import write_caqra, write_static
from tests.unit.test_model import SMALL, randomised
from trainer.checkpoint import same_run, saving, store
from trainer.checkpoint.consistency import hash_tensors
from trainer.checkpoint.manifest import CheckpointError, FileRecord, sha256_of
from trainer.checkpoint.record import Record, write_tensors
from trainer.config import ConfigError
from trainer.config_file import load
from trainer.engine import resolve_deepspeed
from trainer.model.topoflow import TopoFlow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, tiny_scan: ScanCache) -> Path:
    return tiny_config(tmp_path_factory.mktemp("silent"), tiny_path)


def told(done: Any, key: str = "JOB") -> list[dict[str, Any]]:
    """What the ranks of jobs that were to be refused have printed."""
    return [json.loads(line.removeprefix(f"{key} ")) for line in done.stdout.splitlines() if line.startswith(f"{key} ")]


def test_f44_what_replaces_a_checkpoint_is_what_is_loaded_and_no_older_form_of_it(config: Path) -> None:
    """A converted form beside step N was trusted by its name: after N was damaged and written again, another number of ranks
    loaded the old weights."""
    run = config.parent / "rewritten"
    common = [f"run_dir={run}", "checkpoint.every=5"]
    train_several(config, [{"overrides": [*common, "steps=10"]}])
    newest = run / "checkpoints/step-00000010"
    shutil.copytree(newest, run / "checkpoints/step-00000010.universal")
    shutil.copytree(newest, run / "first")
    with (newest / "optimizer.safetensors").open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\x11\x22\x33")
    other_rate = [*common, "optimizer.lr=1e-2"]
    train_several(config, [{"overrides": [*other_rate, "steps=10", "--allow-change", "optimizer.lr"]}])
    second = load_file(newest / "weights.safetensors")
    assert any(not torch.equal(second[name], old) for name, old in load_file(run / "first/weights.safetensors").items())
    still = [*common, "optimizer.lr=1e-30", "optimizer.alpha_lr=1e-30", "--allow-change", "optimizer", "steps=11"]
    train_several(config, [{"overrides": still}], ranks=1)
    third = load_file(run / "checkpoints/step-00000011/weights.safetensors")
    assert all(torch.equal(third[name], value) for name, value in second.items())


def test_f45_layouts_of_deepspeed_interchange_and_what_changes_numbers_is_refused(config: Path) -> None:
    """DeepSpeed's JSON was no part of the manifest: another layout put 40 of 44 moments onto the wrong parameters."""
    folder = config.parent / "layouts"
    small = {"reduce_bucket_size": 3000, "stage3_prefetch_bucket_size": 2000, "sub_group_size": 5000}

    def job(name: str, steps: int, **more: Any) -> dict[str, Any]:
        return {"zero": "3", "overrides": [f"run_dir={folder}/{name}", f"steps={steps}", "checkpoint.every=6"], **more}

    train_several(config, [job("whole", 10), job("start", 6)])
    for name in ("cut", "rounded"):
        shutil.copytree(folder / "start", folder / name)
    rounded = job("rounded", 10, deepspeed={"communication_data_type": "bf16"}, refused=True)
    done = train_several(config, [job("cut", 10, deepspeed={"zero_optimization": small}), rounded])
    assert len(told(done)) == 2
    for line in told(done):
        assert "deepspeed.communication_data_type: fp32 then, bf16 now" in line["said"]
    np.testing.assert_allclose(losses(folder / "cut"), losses(folder / "whole"), rtol=1e-5)
    a, b = (load_file(folder / name / "checkpoints/step-00000010/optimizer.safetensors") for name in ("cut", "whole"))
    for name, value in b.items():
        assert float((a[name] - value).norm()) <= 1e-4 * float(value.norm()) + 1e-9, name


def test_f45_a_setting_nobody_has_judged_is_taken_to_change_numbers() -> None:
    """Any key of DeepSpeed that is not known to say only where and when is compared."""
    now = present(deepspeed={"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}, "steps_per_print": 5})
    with pytest.raises(CheckpointError, match=r"deepspeed\.zero_optimization\.zero_quantized_gradients: None then, True now"):
        same_run.compare(Path("c"), present(), now, [])
    assert same_run.compare(Path("c"), present(), now, ["deepspeed"])[0]["name"].endswith("zero_quantized_gradients")


def test_f45_round_robin_gradients_are_refused_and_their_scrambled_map_is_found_out(config: Path, tmp_path: Path) -> None:
    """With them DeepSpeed itself finds a parameter's state under another name; the proof does not believe its map."""
    settings = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    settings["zero_optimization"]["round_robin_gradients"] = True
    (tmp_path / "rr.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="round_robin_gradients"):
        resolve_deepspeed(tmp_path / "rr.json", load(config), 2)
    folder = config.parent / "scrambled"
    job = {
        "zero": "2",
        "overrides": [f"run_dir={folder}", "steps=1", "schedule.warmup_steps=0"],
        "refused": True,
        "without_check": True,
        "deepspeed": {"zero_optimization": {"round_robin_gradients": True}},
    }
    lines = told(train_several(config, [job]))
    assert [line["rank"] for line in sorted(lines, key=lambda x: x["rank"])] == [0, 1]
    assert all("elsewhere than it says" in line["said"] for line in lines)


def test_f45_moments_that_are_not_those_that_were_saved_are_refused_on_every_rank(config: Path) -> None:
    """A file with its recorded hash, and another tensor in it: the hashes of the tensors themselves are compared."""
    run = config.parent / "moments"
    train_several(config, [{"overrides": [f"run_dir={run}", "steps=4"]}])
    checkpoint = run / "checkpoints/step-00000004"
    state = load_file(checkpoint / "optimizer.safetensors")
    one, other = state["blocks.0.norm1.weight.exp_avg"], state["blocks.0.norm1.bias.exp_avg"]
    state |= {"blocks.0.norm1.weight.exp_avg": other, "blocks.0.norm1.bias.exp_avg": one}  # the classical mistake
    save_file(state, checkpoint / "optimizer.safetensors")
    tree = manifest(checkpoint)
    content = (checkpoint / "optimizer.safetensors").read_bytes()
    tree["files"]["optimizer.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(tree))
    done = train_several(config, [{"overrides": [f"run_dir={run}", "steps=6"], "refused": True}])
    assert "'blocks.0.norm1.bias.exp_avg' is not what was saved (2 such tensors)" in done.stderr
    lines = told(done)
    assert len(lines) == 2
    assert all("every checkpoint in" in line["said"] and "is damaged" in line["said"] for line in lines)


def test_f46_a_person_s_copies_are_never_resumed_from_counted_or_removed(tmp_path: Path) -> None:
    """A copy beside the checkpoints was taken for one: resumed from, counted by retention, deleted."""
    for step in (2, 4, 6, 8):
        make(tmp_path, step, None)
    folder = tmp_path / "checkpoints"
    copies = [
        "step-00000004.keep_this_one",
        "step-00000002-backup",
        "step-00000008 (copy)",
        "step-8",
        "step-000000008",
        "step-00000008.old",
        "step-00000008.universal",
        "Step-00000008",
        "step-00000099",
        "best",
    ]
    for name in copies:
        shutil.copytree(folder / "step-00000008", folder / name)
    (folder / "elsewhere").mkdir()
    (folder / "step-00000006").rename(folder / "elsewhere/six")
    (folder / "step-00000006").symlink_to("elsewhere/six")
    assert [path.name for path in [found.path for found in store.look(tmp_path)]] == [f"step-{n:08d}" for n in (2, 4, 6, 8)]
    store.retain(tmp_path, keep_last=1, keep_every=None)
    left = sorted(path.name for path in folder.iterdir())
    assert left == sorted([*copies, "elsewhere", "step-00000006", "step-00000008"])
    assert (folder / "elsewhere/six/weights.safetensors").exists()


def test_f46_a_stranger_s_directory_in_the_way_of_a_save_is_moved_aside(tmp_path: Path) -> None:
    """A copy of step 4 that was called step 8 must not be overwritten by the real step 8."""
    make(tmp_path, 4, None)
    stranger = tmp_path / "checkpoints/step-00000008"
    shutil.copytree(tmp_path / "checkpoints/step-00000004", stranger)
    assert saving._move_aside(stranger) is None
    (kept,) = (tmp_path / "checkpoints").glob("step-00000008.aside-*")
    assert (kept / "weights.safetensors").exists()


def test_f47_a_run_directory_of_each_node_is_refused_before_step_1(config: Path) -> None:
    """All saves "succeeded" on disks that rank 0 cannot see; the first restart called every checkpoint damaged."""
    job = {"overrides": [f"run_dir={config.parent}/of-each"], "refused": True, "run_dir_of_rank": True}
    lines = told(train_several(config, [job]))
    assert len(lines) == 2
    assert all("rank(s) [1] on" in line["said"] and "disk of each host" in line["said"] for line in lines)
    assert all(line["seconds"] < 10 for line in lines)


def test_f47_a_file_that_rank_0_does_not_see_keeps_a_checkpoint_from_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest counts what rank 0 itself can see, before the rename."""
    monkeypatch.setattr(saving, "SEEN_WITHIN_S", 0.0)
    begun = saving.Saving.__new__(saving.Saving)
    begun.final = tmp_path / "checkpoints/step-00000003"
    begun.partial = tmp_path / "checkpoints/step-00000003.partial"
    begun.partial.mkdir(parents=True)
    begun._memory = present()
    record = FileRecord(bytes=10, sha256="0" * 64)
    with pytest.raises(CheckpointError, match="rank 0 sees None bytes of .*one directory for all hosts"):
        begun._publish([({"optimizer-002-of-002.safetensors": record}, {})])
    assert not begun.final.exists()


def spoilt(change: Callable[[Tensor], Tensor], name: str = "blocks.1.mlp.fc1.weight") -> Callable[[dict], dict]:
    def apply(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state | {name: change(state[name].clone())}

    return apply


def hole(tensor: Tensor) -> Tensor:
    tensor.flatten()[256:1024] = 0.0
    return tensor


def value(number: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[7] = number
        return tensor

    return change


UNFIT = {
    "NaN": (spoilt(value(float("nan"))), "blocks.1.mlp.fc1.weight has 1 values that are not finite"),
    "Inf": (spoilt(value(float("-inf")), "norm.bias"), "norm.bias has 1 values that are not finite"),
    "zeros": (spoilt(torch.zeros_like), "is 0 everywhere"),
    "ones": (spoilt(torch.ones_like), "is 1 everywhere"),
    "all zeros": (lambda s: {k: torch.zeros_like(v) for k, v in s.items()}, "is 0 everywhere"),
    "hole": (spoilt(hole), "zeros in a row: the file was not copied whole"),
    "int8": (spoilt(lambda t: (t * 50).to(torch.int8)), "is int8, not floating-point weights"),
    "int64": (spoilt(lambda t: (t * 50).long(), "norm.weight"), "is int64, not floating-point"),
    "bool": (spoilt(lambda t: t > 0), "is bool, not floating-point"),
    "complex": (spoilt(lambda t: t.to(torch.complex64)), "is complex64, not floating-point"),
    "float8": (spoilt(lambda t: t.to(torch.float8_e4m3fn)), "is float8_e4m3fn, not floating-point"),
    "fp16 overflow": (spoilt(lambda t: (value(1e6)(t)).half()), "fp16 overflows at 65504"),
    "fp64 overflow": (spoilt(lambda t: value(1e300)(t.double())), "values that are not finite"),
    "sparse": (spoilt(lambda t: t.to_sparse()), "is sparse"),
    "meta": (spoilt(lambda t: t.to("meta")), "is meta"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_f48_values_that_cannot_be_weights_are_refused_by_name(case: str, tmp_path: Path) -> None:
    """An import took NaN, zeros, integers, complex numbers and fp16 that had overflowed for weights."""
    change, message = UNFIT[case]
    arch = replace(SMALL, width=96)
    torch.save(change(randomised(arch, dtype=torch.float32).state_dict()), tmp_path / "file.pt")
    _, report = import_weights(TopoFlow(arch), tmp_path / "file.pt", [])
    assert not report.complete
    with pytest.raises(CheckpointError) as refused:
        report.refuse_unless_complete()
    assert message in str(refused.value)


@pytest.mark.parametrize("kind", ["ckpt", "our export", "our checkpoint"])
def test_f48_a_flipped_byte_is_refused(kind: str, tmp_path: Path) -> None:
    """torch does not look at the checksums of its own archives, and safetensors have none."""
    state = randomised(SMALL, dtype=torch.float32).state_dict()
    record = Record(config=run_of(SMALL).model_dump(mode="json"))
    file = source = tmp_path / "file.safetensors"
    if kind == "ckpt":
        file = source = tmp_path / "file.ckpt"
        torch.save({"state_dict": state}, file)
    elif kind == "our export":
        write_tensors(file, state, record)
    else:
        source = make(tmp_path, 4, None)
        file = source / "weights.safetensors"
        write_tensors(file, state, record)
        tree = manifest(source)
        tree["files"]["weights.safetensors"] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        tree["tensors"], tree["config"] = hash_tensors(state.items()), record.config
        (source / "manifest.json").write_text(json.dumps(tree))
    import_weights(TopoFlow(SMALL), source, [])[1].refuse_unless_complete()
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not have its checksum|does not have the sha256|is not what was saved"):
        import_weights(TopoFlow(SMALL), source, [])


@pytest.mark.parametrize("form", ["NETCDF3_CLASSIC", "NETCDF3_64BIT_OFFSET", "NETCDF3_64BIT_DATA"])
@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("kind", ["i1", "i2", "f4", "f8"])
def test_f49_a_classic_file_is_as_long_as_its_header_says(form: str, records: bool, kind: str, tmp_path: Path) -> None:
    """Reads past the end of a cut-off NetCDF-3 file are zeros: packed ozone was wrong by 16 %, exit 0."""
    for variables in (1, 2, 3):
        path = tmp_path / f"{variables}.nc"
        with netCDF4.Dataset(path, "w", format=form) as file:
            file.title = "abc"
            file.createDimension("t", None if records else 5)
            file.createDimension("x", 3)
            file.createVariable("x", "f8", ("x",))[:] = 1
            for number in range(variables):
                written = file.createVariable(f"v{number}", kind, ("t",) if number == 1 else ("t", "x"))
                written.units = "m"
                written[:5] = 1
        netcdf3.require_whole(path)
        content = path.read_bytes()
        for kept in (len(content) - 4, len(content) // 2, 40, 5):  # less than a word at the end may be padding
            path.write_bytes(content[:kept])
            with pytest.raises(DataError, match="is cut off|header of this classic NetCDF file is damaged or cut off"):
                netcdf3.require_whole(path)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_static(folder / "static.nc")
    write_caqra(folder / "good.nc", start="2015-01-01", hours=30)
    write_caqra(folder / "bad.nc", start="2015-01-01", hours=30, seed=9)
    return folder


def plan(raw: Path, *files: Path) -> Plan:
    static = raw / "static.nc"
    return Plan(
        sources=(Source("caqra", known_fields("caqra"), list(files)),),
        lat=(24.0, 46.0),
        lon=(92.0, 116.0),
        grid=(16, 32),
        splits={"train": ("2015-01-01", "2015-01-02")},
        elevation=f"{static}:z",
        population=f"{static}:people",
        land_mask=f"{static}:land",
        shard_hours=12,
    )


def test_f50_a_source_that_was_replaced_by_another_of_the_same_size_and_time_is_read_again(raw: Path, tmp_path: Path) -> None:
    """The shard of a damaged copy was kept: only the size of a source was compared."""
    source = tmp_path / "source.nc"
    size = max((raw / name).stat().st_size for name in ("good.nc", "bad.nc"))

    def put(name: str) -> None:
        content = (raw / name).read_bytes()
        source.write_bytes(content + b"\0" * (size - len(content)))
        os.utime(source, (1e9, 1e9))

    ours, path = plan(raw, source), tmp_path / "s.zarr"
    put("bad.nc")
    begun = beginning.begin(path, ours)
    assert begun
    begun.load([0], workers=1)
    assert begun.remaining() == [1, 2]
    put("good.nc")
    with pytest.raises(DataError, match="changed while it was read"):
        begun.load([1], workers=1)
    again = beginning.begin(path, ours)
    assert again
    assert again.remaining() == [0, 1, 2]
    stages.prepare(path, ours, workers=1)
    put("good.nc")  # once more: other times of the file system, the same content
    assert not beginning.begin(path, ours)
    truth = tmp_path / "truth.zarr"
    stages.prepare(truth, plan(raw, raw / "good.nc"), workers=1)
    assert stores.open_store(path).shard_hashes() == stores.open_store(truth).shard_hashes()
    put("bad.nc")
    with pytest.raises(DataError, match="has another content than when .* was made of it"):
        beginning.begin(path, ours)


def forecast_file(path: Path, references: list[int], periods: list[int], with_period: bool = True) -> None:
    """A field whose value is the hour that it is valid at; dimensions as the Atmosphere Data Store writes them."""
    lat, lon = np.arange(20.0, 24.0), np.arange(100.0, 105.0)
    valid = np.add.outer(periods, references).astype("f4")
    fields = np.broadcast_to(valid[:, :, None, None], (*valid.shape, 4, 5))
    dims = ("forecast_period", "forecast_reference_time", "latitude", "longitude")
    coordinates: dict[str, Any] = {
        "forecast_reference_time": (
            "forecast_reference_time",
            references,
            {"units": "hours since 2015-03-01", "standard_name": "forecast_reference_time"},
        ),
        "latitude": ("latitude", lat, {"units": "degrees_north"}),
        "longitude": ("longitude", lon, {"units": "degrees_east"}),
    }
    if with_period:
        coordinates["forecast_period"] = ("forecast_period", np.array(periods, "f8"), {"units": "hours"})
    xr.Dataset({"pm2p5": (dims, fields, {"units": "ug m-3"})}, coordinates).to_netcdf(path)


def read(found: Catalogue, start: np.datetime64, count: int) -> dict[str, np.ndarray]:
    """All fields on the grid of the files."""
    (grid,) = found.grids
    cells = grid.shape[0] * grid.shape[1]
    same = Regridder(scipy.sparse.csr_array(scipy.sparse.eye_array(cells), dtype="f4"), grid.shape)
    fields = {name: np.full((count, *grid.shape), np.nan, "f4") for name in found.rows}
    Reader(found, [same], read_as(()), fields, start).read()
    return fields


FIELD = {"pm25": Named(("pm2p5",), "ug m-3")}


def catalogued(fields: dict[str, Named], files: list[Path], clock: Clock = DEFAULT_CLOCK) -> Catalogue:
    return make_catalogue(files[0].parent / "s.zarr", (Source("generic", fields, files, clock),), ())


@pytest.mark.parametrize(
    ("references", "periods", "lead", "expected"),
    [
        ([0, 12], [24], None, [24, 36]),
        ([0], [0, 3, 6], None, [0, 3, 6]),
        ([0, 12], [0, 3, 6, 9], None, [0, 3, 6, 9, 12, 15, 18, 21]),
        ([0, 12, 24], [3, 15], (15.0,), [15, 27, 39]),
        ([0, 12], [3, 6, 15, 18], (3.0, 6.0), [3, 6, 15, 18]),
    ],
)
def test_f51_forecasts_are_stored_at_the_hour_they_are_valid_at(
    references: list[int], periods: list[int], lead: tuple[float, ...] | None, expected: list[int], tmp_path: Path
) -> None:
    """The reference time was taken for the time: forecasts of 24 h stood 24 h early, exit 0."""
    forecast_file(tmp_path / "f.nc", references, periods)
    found = catalogued(FIELD, [tmp_path / "f.nc"], Clock(lead))
    start = np.datetime64("2015-03-01T00", "h")
    assert ((found.hours["pm25"] - start).astype(int) == expected).all()
    values = read(found, start, 48)["pm25"]
    for hour in expected:
        assert (values[hour] == hour).all()


def test_f51_an_hour_with_several_lead_times_or_without_any_is_refused_with_the_choice(tmp_path: Path) -> None:
    """Nobody can guess which of two forecasts of one hour is meant."""
    forecast_file(tmp_path / "f.nc", [0, 12], [3, 15])
    with pytest.raises(DataError, match=r"several lead times, choose which to take, as --lead 3"):
        catalogued(FIELD, [tmp_path / "f.nc"])
    with pytest.raises(DataError, match=r"--lead asks for 4 h, its lead times are 3, 15 h"):
        catalogued(FIELD, [tmp_path / "f.nc"], Clock((4.0,)))
    forecast_file(tmp_path / "g.nc", [0, 12], [3], with_period=False)
    with pytest.raises(DataError, match="no forecast period"):
        catalogued(FIELD, [tmp_path / "g.nc"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 2}\na: 3\n", "'a' is written twice, in lines 1 and 3"),
        ("optimizer: {lr: 1}\ndata: {}\noptimizer:\n  clip: 2\n", "'optimizer' is written twice, in lines 1 and 3"),
        ("a:\n  b:\n    c: 1\n    d: 2\n    c: 1\n", "'c' is written twice, in lines 3 and 5"),
        ("? [1, 2]\n: 3\n", "cannot be a key"),
    ],
)
def test_f52_a_key_written_twice_is_refused_with_both_lines(text: str, message: str) -> None:
    """A section written twice: the first was dropped without a word."""
    with pytest.raises(DataError, match=message):
        parse_yaml(text, "file")


def test_f52_in_json_and_among_overrides_too(config: Path) -> None:
    """DeepSpeed's JSON, and a section on the command line after one of its own keys."""
    with pytest.raises(DataError, match="'stage' is written twice, see lines 2, 3"):
        parse_json('{"zero_optimization": {\n "stage": 1,\n "stage": 2}}', "file")
    for first, second in (("steps=5", "steps=6"), ("optimizer.lr=1e-3", "optimizer={clip: 0.5}")):
        with pytest.raises(ConfigError, match="would drop"):
            load(config, [first, second])
    assert load(config, ["optimizer={clip: 0.5}", "optimizer.lr=1e-3"]).optimizer.lr == 1e-3


def test_f53_weights_that_a_resumed_run_ignores_are_said_to_be_and_absent_ones_refused(config: Path, tmp_path: Path) -> None:
    """Another init_from with an old run directory was ignored without a word."""
    for seed in (1, 2):
        torch.manual_seed(seed)

        save_file(TopoFlow(load(config).architecture()).state_dict(), tmp_path / f"{seed}.safetensors")
    run = f"run_dir={config.parent}/ignoring"
    jobs = [
        {"overrides": [run, "steps=4", f"init_from.path={tmp_path}/1.safetensors"]},
        {"overrides": [run, "steps=5", f"init_from.path={tmp_path}/1.safetensors"]},
        {"overrides": [run, "steps=6", f"init_from.path={tmp_path}/2.safetensors", "expect={val_loss: 99.0, tolerance: 0.1}"]},
        {"overrides": [run, "steps=7", "init_from.path=/does/not/exist"], "refused": True},
    ]
    done = train_several(config, jobs)
    assert done.stderr.count("is ignored: the run continues from") == 2
    assert f"init_from (path={tmp_path}/2.safetensors) is ignored" in done.stderr
    assert "expect (val_loss=99.0, tolerance=0.1) is ignored" in done.stderr
    assert all("no weights at /does/not/exist" in line["said"] for line in told(done))


@pytest.mark.parametrize(
    ("launcher", "local_rank", "visible", "device"),
    [
        ("torchrun", 3, 4, 3),
        ("deepspeed", 0, 1, 0),
        ("srun", 5, 1, 0),
        ("srun", 5, 8, 5),
        ("mpirun", 2, 1, 0),
    ],
)
def test_f54_a_rank_takes_its_own_gpu(launcher: str, local_rank: int, visible: int, device: int) -> None:
    """Under srun each task may see one GPU only, its own; elsewhere ranks share what is visible."""
    assert World(local_rank, local_rank, 8, launcher).gpu(visible) == device


def test_f54_two_ranks_never_share_a_gpu() -> None:
    """More ranks than visible GPUs wrapped around without a word."""
    with pytest.raises(LaunchError, match=r"local rank 2 finds 2 GPU"):
        World(2, 2, 3, "torchrun").gpu(2)


@pytest.mark.parametrize(
    "visible",
    [
        pytest.param("4,5", marks=pytest.mark.slow),
        "GPU-5fb2c1a0-1111-2222-3333-444455556666,GPU-aaaaaaaa-1111-2222-3333-444455556666",
    ],
)
def test_f54_the_launch_script_uses_the_visible_gpus(visible: str, tmp_path: Path) -> None:
    """--num_gpus made ranks take GPUs 0 and 1, somebody else's. A stand-in for the trainer tells what it sees."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "trainer").mkdir()
    stand_in = "import os; open('seen-' + os.environ['RANK'], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    (tmp_path / "trainer/train.py").write_text(stand_in)
    done = subprocess.run(
        ["launch/local.sh", "x.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment() | {"CUDA_VISIBLE_DEVICES": visible, "RANKS": "2"},
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"seen-{rank}").read_text() for rank in range(2)] == [visible, visible]
    too_many = environment() | {"CUDA_VISIBLE_DEVICES": visible, "RANKS": "3"}
    done = subprocess.run(
        ["launch/local.sh", "x.yaml"], cwd=tmp_path, env=too_many, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "names 2 GPUs" in done.stderr


def test_f51_each_variable_is_stored_at_its_own_times(tmp_path: Path) -> None:
    """The times of a file's first variable were taken for all of them."""
    lat, lon = np.arange(20.0, 24.0), np.arange(100.0, 105.0)
    hourly, slow = np.arange(4), np.array([0, 3, 6, 9])
    ones = np.ones((4, 4, 5), "f4")
    fields = {
        "u10": (("time", "latitude", "longitude"), hourly[:, None, None] * ones),
        "pm2p5": (("time2", "latitude", "longitude"), slow[:, None, None] * ones),
    }
    since = {"units": "hours since 2015-03-01"}
    coordinates = {
        "time": ("time", hourly, since),
        "time2": ("time2", slow, since),
        "latitude": ("latitude", lat, {"units": "degrees_north"}),
        "longitude": ("longitude", lon, {"units": "degrees_east"}),
    }
    xr.Dataset(fields, coordinates).to_netcdf(tmp_path / "f.nc")
    found = catalogued(FIELD | {"u": Named(("u10",), "m s-1")}, [tmp_path / "f.nc"])
    start = np.datetime64("2015-03-01T00", "h")
    assert ((found.hours["pm25"] - start).astype(int) == slow).all()
    assert ((found.hours["u"] - start).astype(int) == hourly).all()
    values = read(found, start, 10)["pm25"]
    assert (values[9] == 9).all()


def test_f51_a_lead_time_that_is_asked_for_and_not_there_is_refused(tmp_path: Path) -> None:
    """One of two was dropped; and 9 h in nanoseconds were 9.000000000000002 h."""
    forecast_file(tmp_path / "f.nc", [0], [6, 9, 12])
    with pytest.raises(DataError, match="--lead asks for 6, 8 h"):
        catalogued(FIELD, [tmp_path / "f.nc"], Clock((6.0, 8.0)))
    with xr.open_dataset(tmp_path / "f.nc", decode_times=False) as dataset:
        changed = dataset.load()
    period = changed.forecast_period
    changed["forecast_period"] = ("forecast_period", (period.to_numpy() * 3.6e12).astype("i8"), {"units": "nanoseconds"})
    changed.to_netcdf(tmp_path / "g.nc")
    found = catalogued(FIELD, [tmp_path / "g.nc"], Clock((6.0, 9.0)))
    assert len(found.hours["pm25"]) == 2


def test_f44_a_replacement_that_was_killed_between_its_two_renames_gives_the_name_back(tmp_path: Path) -> None:
    """A roll-back saves its step again: for a moment step N had no name, and a run with one checkpoint began anew."""
    make(tmp_path, 4, None)
    checkpoint = make(tmp_path, 8, None)
    saving._move_aside(checkpoint)
    assert [found.step for found in store.look(tmp_path)] == [4]
    saving.mend(tmp_path)
    assert store.newest(tmp_path) == checkpoint
    assert store.verify(checkpoint) == []


def test_f44_retention_keeps_what_was_just_saved_before_what_was_stepped_over(tmp_path: Path) -> None:
    """After a damaged step 20 the run resumed from 15 and saved 17: kept was 20, deleted all that was good."""
    for step in (15, 17, 20):
        make(tmp_path, step, None)
    store.retain(tmp_path, keep_last=1, keep_every=None, newest_step=17)
    assert 17 in [found.step for found in store.look(tmp_path)]


@pytest.mark.parametrize("stated", [np.float64(-999.9), np.array([-999.9, -99.0], "f4"), "-999.9"])
def test_a_missing_value_is_missing_in_every_form_that_files_state_it(stated: Any) -> None:
    """A double on float data, several, or text: -999.9 was a value, or a traceback."""
    values = np.array([1.0, -999.9, 3.0], "f4")
    stored = Stored("pm25", values.copy(), {"missing_value": stated})
    assert np.isnan(decoded(stored)).tolist() == [False, True, False]
    with pytest.raises(DataError, match="is not a number"):
        decoded(Stored("pm25", values.copy(), {"missing_value": "none"}))


def test_an_unknown_unit_in_a_later_file_is_refused_before_the_first_shard(tmp_path: Path) -> None:
    """It was found at the shard that first needed the file; superscripts and the micro sign are known."""
    forecast_file(tmp_path / "a.nc", [0], [0, 3])
    for units, message in (
        ("µg/m³", None),
        ("µg m⁻³", None),
        ("furlongs", "is in 'furlongs', which cannot be turned into ug m-3"),
    ):
        forecast_file(tmp_path / "b.nc", [24], [0, 3])
        with xr.open_dataset(tmp_path / "b.nc", decode_times=False) as dataset:
            changed = dataset.load()
        changed.pm2p5.attrs["units"] = units
        changed.to_netcdf(tmp_path / "c.nc")
        files = [tmp_path / "a.nc", tmp_path / "c.nc"]
        if message is None:
            assert len(catalogued(FIELD, files).hours["pm25"]) == 4
        else:
            with pytest.raises(DataError, match=message):
                catalogued(FIELD, files)
