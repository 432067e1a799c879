"""Every file that the product opens, truncated, flipped, swapped for another or edited: a message, never a traceback.

All cases run in this process through the commands themselves; a command returns its exit code, and anything that it raises
is the failure that is looked for.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import load_file, save_file

from data import Refusal
from data.__main__ import main as data_main
from data.wind_scan.cache import ScanCache
from tests.launching import ROOT, tiny_config
from tests.launching import train as start_training
from tests.reanalysis import write_caqra, write_static
from trainer import engine
from trainer.__main__ import main as trainer_main
from trainer.config_file import load

ROUNDS = 5 if "TOPOFLOW_ALL_WAYS" in os.environ else 2  # of every mutation, for every file


@dataclass(frozen=True)
class Input:
    """A file that is opened, and the commands that open it, given the folder that it lies in."""

    file: str
    open: Callable[[Path], list[tuple[Callable[[list[str]], int], list[str]]]]


def truncated(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: int(rng.integers(0, max(1, len(content))))]


def flipped(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content or b"x")
    # Half of the flips hit the first kilobyte, where most formats keep what they are.
    for _ in range(int(rng.integers(1, 12))):
        changed[int(rng.integers(0, min(len(changed), 1024) if rng.random() < 0.5 else len(changed)))] ^= int(
            rng.integers(1, 256)
        )
    return bytes(changed)


def zeroed(content: bytes, rng: np.random.Generator) -> bytes:
    first = int(rng.integers(0, max(1, len(content))))
    length = int(rng.integers(1, max(2, len(content) // 4)))
    return content[:first] + bytes(len(content[first : first + length])) + content[first + length :]


def edited(content: bytes, rng: np.random.Generator) -> bytes:
    """JSON with one value, anywhere, replaced or removed; other files with bytes inserted."""
    try:
        tree = json.loads(content)
    except ValueError:
        at = int(rng.integers(0, max(1, len(content))))
        return content[:at] + bytes(rng.integers(0, 256, 9, dtype="u1")) + content[at:]
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else []):
            places.append((node, key))
            walk(value)

    walk(tree)
    if not places:
        return b"[]"
    node, key = places[int(rng.integers(len(places)))]
    replacement = [None, "text", -1, 1e308, [], {}, True, [[1]], "\u0000", {"a": {"b": []}}][int(rng.integers(10))]
    if rng.random() < 0.3:
        del node[key]
    else:
        node[key] = replacement
    return json.dumps(tree).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, tiny_scan: ScanCache) -> Path:
    """One of everything, on the tiny store."""
    top = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(tiny_path, top / "s.zarr")
    shutil.copytree(tiny_scan.path, top / "s.wind_scan")
    config = tiny_config(top, top / "s.zarr", run_dir=str(top / "run"))
    done = start_training(config, "steps=2", "schedule.warmup_steps=0", ranks=1)
    assert done.returncode == 0, done.stderr[-2000:]
    (top / "zero.json").write_text((ROOT / "ds_configs/zero2.json").read_text())
    state = load_file(top / "run/checkpoints/step-00000002/weights.safetensors")
    torch.save(
        {"state_dict": {f"net.{k}": v for k, v in state.items()}, "hyper_parameters": {"lr": np.float64(1)}}, top / "w.ckpt"
    )
    torch.save({"module": state}, top / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, top / "w.safetensors")
    (top / "w.json").write_text(json.dumps({"statistics": {}, "fingerprints": {}, "val_loss": 1.0, "val_step": 1, "step": 1}))
    orders = {s: torch.arange(128) for s in range(16)}
    regional = {r: {s: torch.arange(8) for s in range(16)} for r in range(16)}
    with (top / "cache.pkl").open("wb") as file:
        pickle.dump(
            {
                "grid_h": 8,
                "grid_w": 16,
                "num_sectors": 16,
                "regions_h": 4,
                "regions_w": 4,
                "sector_angles": [0.0] * 16,
                "cached_orders": orders,
                "regional_cached_orders": regional,
            },
            file,
        )
    scores = {"pm25": {"6h": {"units": "ug m-3", "rmse": 1.0, "skill": 0.1}}}
    evaluation = {
        "fingerprints": {},
        "split": "test",
        "samples": 3,
        "period": ["a", "b"],
        "baseline": "persistence",
        "weather": "of the analysis",
        "scores": scores,
        "step": 2,
    }
    for name in ("one.json", "two.json"):
        (top / name).write_text(json.dumps(evaluation))
    write_static(top / "static.nc")
    write_caqra(top / "four.nc", start="2015-01-01", hours=3)
    with xr.open_dataset(top / "four.nc", decode_times=False, mask_and_scale=False) as source:
        source.to_netcdf(top / "three.nc", format="NETCDF3_64BIT")
    polygon = {"type": "Polygon", "coordinates": [[[90, 20], [120, 20], [120, 48], [90, 48], [90, 20]]]}
    (top / "domain.geojson").write_text(json.dumps({"type": "Feature", "geometry": polygon, "properties": {}}))
    np.save(top / "domain.npy", np.ones((8, 12), "u1"))
    (top / "map.yaml").write_text(
        "".join(
            f"{name}: {{name: {name}}}\n" for name in ("u", "v", "temp", "rh", "psfc", "pm25", "pm10", "so2", "no2", "co", "o3")
        )
    )
    return top


def planned(d: Path) -> list[Any]:
    return [(trainer_main, ["plan", "--config", str(d / "config.yaml"), "--gpus", "2", "--gpu", "h100"])]


def store_read(d: Path) -> list[Any]:
    return [(data_main, ["inspect", str(d / "s.zarr")]), (data_main, ["verify", str(d / "s.zarr")])]


def scan_read(d: Path) -> list[Any]:
    return [(data_main, ["wind-scan", "compare", str(d / "cache.pkl"), str(d / "s.wind_scan")]), *planned(d)]


def checkpoint_read(d: Path) -> list[Any]:
    path = d / "run/checkpoints/step-00000002"
    actions = [["list", str(d / "run")], ["verify", str(path)], ["show", str(path)]]
    export = ["export", str(path), "--to", str(d / "out.safetensors")]
    return [
        *((trainer_main, ["checkpoint", *action]) for action in (*actions, export)),
        (trainer_main, ["status", str(d / "run")]),
    ]


def imported(name: str) -> Callable[[Path], list[Any]]:
    return lambda d: [
        (trainer_main, ["import", "--from", str(d / name), "--to", str(d / "to"), "--config", str(d / "config.yaml")])
    ]


def prepared(name: str) -> Callable[[Path], list[Any]]:
    def open_it(d: Path) -> list[Any]:
        for left in d.glob("new.zarr*"):
            shutil.rmtree(left)
        static = d / "static.nc"
        source = name if name in ("four.nc", "three.nc") else "four.nc"
        what = ["caqra", str(d / "new.zarr"), str(d / source)]
        if name == "map.yaml":
            what = ["generic", str(d / "new.zarr"), str(d / source), "--map", str(d / name)]
        where = ["--lat", "24", "46", "--lon", "92", "116", "--grid", "8", "12", "--method", "bilinear"]
        fields = ["--elevation", f"{static}:z", "--population", f"{static}:people", "--land-mask", f"{static}:land"]
        domain = ["--domain", str(d / name)] if name.startswith("domain") else []
        when = ["--train", "2015-01-01", "2015-01-01", "--stage", "begin"]
        return [(data_main, ["prepare", *what, *where, *fields, *domain, *when])]

    return open_it


def resolved(d: Path) -> list[Any]:
    def resolve(_: list[str]) -> int:
        try:
            engine.resolve_deepspeed(d / "zero.json", load(d / "config.yaml"), 2)
        except Refusal:
            return 2
        return 0

    return [(resolve, [])]


INPUTS = [
    Input("config.yaml", planned),
    Input("zero.json", resolved),
    *(
        Input(f"s.zarr/{name}", store_read)
        for name in (
            "zarr.json",
            "shards.json",
            "time/c/0",
            "chemistry_missing/c/0/0",
            "static/c/0/0/0",
            "lat/zarr.json",
            "weather/zarr.json",
            "chemistry/c/1/0/0/0",
        )
    ),
    *(Input(f"s.wind_scan/{name}", scan_read) for name in ("manifest.json", "orders.npz", "sectors.npy")),
    Input("cache.pkl", scan_read),
    *(
        Input(f"run/checkpoints/step-00000002/{name}", checkpoint_read)
        for name in ("manifest.json", "weights.safetensors", "optimizer.safetensors")
    ),
    *(
        Input(f"run/{name}", lambda d: [(trainer_main, ["status", str(d / "run")])])
        for name in ("metrics.jsonl", "config.yaml")
    ),
    *(Input(name, imported(name)) for name in ("w.ckpt", "old.pt", "w.safetensors")),
    Input("w.json", imported("w.safetensors")),
    Input("one.json", lambda d: [(trainer_main, ["compare", str(d / "one.json"), str(d / "two.json")])]),
    *(Input(name, prepared(name)) for name in ("three.nc", "four.nc", "static.nc", "map.yaml", "domain.geojson", "domain.npy")),
]
MUTATIONS = (truncated, flipped, zeroed, edited)


@pytest.mark.parametrize("number", range(len(INPUTS)), ids=[i.file for i in INPUTS])
def test_a_damaged_file_is_a_message_and_never_a_traceback(
    folder: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """About 300 cases, 600 in `make test-all`; each is one mutation of one file, opened by the commands that read it."""
    given = INPUTS[number]
    file, kept = folder / given.file, (folder / given.file).read_bytes()
    rng = np.random.default_rng(number)
    others = [folder / other.file for other in INPUTS if other.file != given.file]
    cases = [(f"{mutate.__name__} {i}", mutate(kept, rng)) for mutate in MUTATIONS for i in range(ROUNDS)]
    cases += [(f"swapped {i}", others[int(rng.integers(len(others)))].read_bytes()) for i in range(2)] + [("empty", b"")]
    try:
        with chdir(folder):
            for name, content in cases:
                file.write_bytes(content)
                for command, arguments in given.open(folder):
                    try:
                        code = command(arguments)
                    except SystemExit as end:
                        code = int(end.code or 0)
                    except Exception as error:
                        raise AssertionError(
                            f"{given.file}, {name}: {command.__module__} {arguments[:2]}: {error!r}"
                        ) from error
                    assert code in (0, 1, 2), (name, code)
                    said = capsys.readouterr()
                    assert "Traceback" not in said.err, (name, said.err[-2000:])
                    assert code == 0 or len(said.err.splitlines()) < 40, (name, said.err)
    finally:
        file.write_bytes(kept)
