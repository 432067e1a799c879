"""400 ranks in miniature: what one rank opens, reads, holds and waits for at its start, and that it grows with nothing.

1. Rank r of 400 with torch's fake process group: engine, store, wind scan, first batch and one step, for r = 0, 7, 8, 399.
2. 1, 8 and 32 real processes over gloo, without the engine: rendezvous, store, wind scan and weights opened and checked by
   rank 0, which tells the others what it found, and a first batch.
Each of both on a month of data and on six years: what a rank other than 0 reads must not grow.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

ROOT = Path(__file__).parents[1]
RANKS, REAL = (0, 7, 8, 399), (1, 8, 32)


def prepare(folder: Path, days: int) -> Path:
    """A store of 16 x 32 pixels, its wind scan, a checkpoint of initial weights, and the configuration; of nothing else."""
    import torch
    from safetensors.torch import save_file

    from data.store.opening import open_store
    from data.synthetic.recipe import Recipe
    from data.synthetic.synthesize import synthesize
    from data.wind_scan.cache import build
    from trainer.config_file import load
    from trainer.model.topoflow import TopoFlow

    synthesize(folder / "s.zarr", Recipe(days=days, rows=16, cols=32))
    build(open_store(folder / "s.zarr"), folder / "s.wind_scan", patch=2, regions=(8, 16), sectors=16)
    tree = {
        "run_dir": str(folder / "run"),
        "steps": 10,
        "data": {"store": str(folder / "s.zarr"), "lead_hours": [12, 24]},
        "wind_scan": {"mode": "regional", "cache": str(folder / "s.wind_scan")},
        "model": {"grid": [16, 32], "width": 192, "depth": 4, "heads": 8},
        "batch": {"total": 400, "micro": 1},
        "init_from": {"path": str(folder / "weights.safetensors")},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    torch.manual_seed(0)
    save_file(TopoFlow(load(path).architecture()).state_dict(), folder / "weights.safetensors")
    return path


class Meter:
    """Opens of files under a folder, bytes read, and seconds, since it was made."""

    def __init__(self, folder: Path) -> None:
        self.opened: list[str] = []
        self.where = str(folder)
        sys.addaudithook(self._note)
        self.started, self.before = time.perf_counter(), self._read()

    def reading(self) -> dict[str, float]:
        status = Path("/proc/self/status").read_text()
        peak = re.search(r"VmHWM:\s+(\d+)", status)
        assert peak
        return {
            "opens": len(self.opened),
            "megabytes": (self._read() - self.before) / 1e6,
            "seconds": time.perf_counter() - self.started,
            "peak_gb": int(peak[1]) / 1e6,
        }

    def _note(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and self.where in str(arguments[0]):
            self.opened.append(str(arguments[0]))

    def _read(self) -> int:
        found = re.search(r"^rchar: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
        assert found
        return int(found[1])


def pretend(config: Path, rank: int, size: int) -> None:
    """One rank of many whose collectives do nothing: start and one step with the engine."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from trainer import dataset as datasets
    from trainer.config_file import load
    from trainer.engine import build_engine, resolve_deepspeed, set_learning_rates
    from trainer.model.topoflow import TopoFlow
    from trainer.process import launch
    from trainer.scores.errors import weighted_loss

    launch.skip_inference_operator()
    run = load(config, ["init_from=null"])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % 8), WORLD_SIZE=str(size), DS_ACCELERATOR="cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    sent = datasets._open(run)  # which rank 0 does, and sends to the others
    meter = Meter(config.parent)
    with mock.patch.object(datasets, "on_main", return_value=sent):
        dataset = datasets.open_dataset(run, torch.device("cpu"))
    torch.manual_seed(run.seed)
    model = TopoFlow(run.architecture())
    engine = build_engine(model, run, resolve_deepspeed(ROOT / "ds_configs/zero1.json", run, size))
    batch, example, arguments = dataset.prepare(first_batch(dataset, rank, size))
    started = meter.reading()
    engine.backward(weighted_loss(engine(*arguments), example.targets, example.weight).mean())
    set_learning_rates(engine, 0, run)
    engine.step()
    print(json.dumps(started | {"with_step": meter.reading()["seconds"], "position": batch.position}))


def first_batch(dataset: Any, rank: int, size: int) -> Any:
    """What this rank reads first."""
    batch = dataset.run.batch
    return next(dataset.stream(dataset.index("train")).training(0, batch.micro, batch.accumulation(size), size, rank))


def take_part(config: Path) -> None:
    """One real rank: rendezvous, data and weights from one reader, first batch."""
    import torch
    import torch.distributed as dist

    from trainer.config_file import load
    from trainer.dataset import open_dataset
    from trainer.engine import resolve_deepspeed
    from trainer.model.topoflow import TopoFlow
    from trainer.process import launch
    from trainer.run import start

    run = load(config)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meter = Meter(config.parent)
    dist.init_process_group("gloo")
    world = launch.Joined(rank, rank, size, "rehearsal", torch.device("cpu"))
    dataset = open_dataset(run, world.device)
    model = TopoFlow(run.architecture())
    run.run_dir.mkdir(exist_ok=True)
    deepspeed = resolve_deepspeed(ROOT / "ds_configs/zero1.json", run, size)
    start.begin(dataset, model, start.describe(run, dataset, model, deepspeed, size), [])
    first_batch(dataset, rank, size)
    dist.barrier()
    print(json.dumps(meter.reading() | {"rank": rank}))
    dist.destroy_process_group()


def child(mode: str, config: Path, rank: int, size: int, port: int = 0) -> subprocess.Popen[str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "benchmarks.rehearsal", "--child", mode, str(config), str(rank), str(size)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=4, metavar=("MODE", "CONFIG", "RANK", "SIZE"), help="of this script's own")
    options = parser.parse_args()
    if options.child:
        mode, config, rank, size = options.child
        if mode == "pretend":
            pretend(Path(config), int(rank), int(size))
        else:
            take_part(Path(config))
        return
    for title, days in (("a month", 30), ("six years", 6 * 365)):
        with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
            rehearse(prepare(Path(folder), days), title)


def rehearse(config: Path, title: str) -> None:
    """Print what each kind of rank needed on a store."""
    print(f"== {title} of data")
    print("one of 400 ranks, with the engine, collectives that do nothing:")
    for rank in RANKS:
        r = answer(child("pretend", config, rank, 400))
        place, step = f"place {r['position']}", f"{r['with_step']:.2f} s with a step"
        print(
            f"  rank {rank:3d}: {r['opens']} opens, {r['megabytes']:.2f} MB read, {r['seconds']:.2f} s to a batch, "
            f"{place}; {step}; peak {r['peak_gb']:.2f} GB"
        )
    print("real ranks over gloo, one store, one checkpoint:")
    for size in REAL:
        tree = yaml.safe_load(config.read_text()) | {"batch": {"total": size, "micro": 1}}
        config.write_text(yaml.safe_dump(tree))
        readings = [answer(p) for p in [child("real", config, rank, size, 29700 + size) for rank in range(size)]]
        others = readings[1:] or readings
        print(
            f"  {size:2d}: rank 0 {readings[0]['opens']} opens, {readings[0]['megabytes']:.2f} MB; others at most "
            f"{max(r['opens'] for r in others)} opens, {max(r['megabytes'] for r in others):.2f} MB; "
            f"{max(r['seconds'] for r in readings):.2f} s from rendezvous to the first batch on 2 cores"
        )


if __name__ == "__main__":
    main()
