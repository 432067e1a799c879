"""Injects one fault after another into a run and prints what preflight says of each: {case: [[check, state, found, remedy]]}.

Arguments: the configuration, a store, an empty folder. One process, because starting is most of the cost.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

from data.store.opening import open_store
from trainer.config_file import load
from trainer.model.topoflow import TopoFlow
from trainer.preflight import command, job, network, plan, report
from trainer.preflight.examine import examine
from trainer.process import launch
from trainer.process.failure import quieten

CONFIG, STORE, FOLDER = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
ROOT = Path(__file__).parents[2]
Options = list[str]


@contextmanager
def nothing() -> Iterator[Options]:
    yield []


def overriding(*options: str) -> Callable[[], object]:
    @contextmanager
    def case() -> Iterator[Options]:
        yield list(options)

    return case


def with_environment(**variables: str) -> Callable[[], object]:
    @contextmanager
    def case() -> Iterator[Options]:
        with mock.patch.dict(os.environ, variables):
            yield []

    return case


@contextmanager
def damaged_shards() -> Iterator[Options]:
    copy = FOLDER / "damaged.zarr"
    shutil.copytree(STORE, copy)
    for shard in [*copy.glob("chemistry/c/*/0/0/0"), *copy.glob("weather/c/*/0/0/0")]:
        body = bytearray(shard.read_bytes())
        body[5000] ^= 1
        shard.write_bytes(body)
    yield [f"data.store={copy}"]


@contextmanager
def edited_statistics() -> Iterator[Options]:
    copy = FOLDER / "edited.zarr"
    shutil.copytree(STORE, copy)
    metadata = copy / "zarr.json"
    tree = json.loads(metadata.read_text())
    tree["attributes"]["statistics"]["pm25"]["mean"] *= 2
    metadata.write_text(json.dumps(tree))
    yield [f"data.store={copy}"]


@contextmanager
def statistics_of_other_data() -> Iterator[Options]:
    honest = open_store(STORE)
    honest.statistics["pm25"]["std"] *= 50.0
    with mock.patch("data.store.opening.open_store", return_value=honest):
        yield []


@contextmanager
def incomplete_weights() -> Iterator[Options]:
    state = TopoFlow(load(CONFIG).architecture()).state_dict()
    save_file({name: t for name, t in state.items() if "head" not in name}, FOLDER / "incomplete.safetensors")
    yield [f"init_from={{path: {FOLDER}/incomplete.safetensors}}"]


@contextmanager
def lost_position_embedding() -> Iterator[Options]:
    build = TopoFlow.__init__

    def forgetful(self: TopoFlow, *arguments: object) -> None:
        build(self, *arguments)  # type: ignore[arg-type]
        torch.nn.init.zeros_(self.pos_embed)

    with mock.patch.object(TopoFlow, "__init__", forgetful):
        yield []


@contextmanager
def scan_that_is_not_read() -> Iterator[Options]:
    forward = TopoFlow.forward

    def deaf(self: TopoFlow, x: torch.Tensor, lead: torch.Tensor, elevation: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
        return forward(self, x, lead, elevation, torch.arange(rank.shape[1]).expand_as(rank))

    with mock.patch.object(TopoFlow, "forward", deaf):
        yield []


@contextmanager
def loss_that_is_not_finite() -> Iterator[Options]:
    with mock.patch.object(network, "weighted_loss", lambda f, t, w, k: f.mean((0, 2, 3)) * torch.nan):
        yield []


@contextmanager
def skewed_clock() -> Iterator[Options]:
    with mock.patch.object(job.time, "time", return_value=time.time() + 90.0):
        yield []


@contextmanager
def file_system_that_alters() -> Iterator[Options]:
    commit = network.saving.Saving.commit

    def altered(self: network.saving.Saving) -> Path:
        path = commit(self)
        file = path / "weights.safetensors"
        content = bytearray(file.read_bytes())
        content[-100] ^= 4
        file.write_bytes(content)
        return path

    with mock.patch.object(network.saving.Saving, "commit", altered):
        yield []


@contextmanager
def small_disk() -> Iterator[Options]:
    full = shutil._ntuple_diskusage(10**9, 10**9, 10**5)  # type: ignore[attr-defined]
    with mock.patch.object(job.shutil, "disk_usage", return_value=full):
        yield []


@contextmanager
def small_gpu() -> Iterator[Options]:
    tiny = plan.Gpu("a small GPU", 1e12, 1e12, 1e6, 1e9)
    with mock.patch.dict(plan.GPUS, {"h200": tiny}):
        yield ["--gpu", "h200"]


@contextmanager
def unwritable_run_dir() -> Iterator[Options]:
    (FOLDER / "a-file").write_text("")
    yield [f"run_dir={FOLDER}/a-file/run"]


CASES: dict[str, Callable[[], object]] = {
    "healthy": nothing,
    "misspelt key": overriding("optimizer.learning_rate=1.0"),
    "batch": overriding("--world-size", "3"),
    "launch script": overriding("--script", str(ROOT / "launch/slurm.sbatch"), "--world-size", "4"),
    "no InfiniBand": with_environment(NCCL_IB_DISABLE="1"),
    "no plugin": with_environment(NCCL_NET_PLUGIN="none"),
    "shared kernel cache": with_environment(MIOPEN_USER_DB_PATH="/home/me/miopen"),
    "blocking launches": with_environment(CUDA_LAUNCH_BLOCKING="1"),
    "absent store": overriding("data.store=/nowhere.zarr"),
    "damaged shards": damaged_shards,
    "edited statistics": edited_statistics,
    "statistics of other data": statistics_of_other_data,
    "absent cache": overriding("wind_scan.cache=/nowhere.wind_scan"),
    "incomplete weights": incomplete_weights,
    "lost embedding": lost_position_embedding,
    "deaf scan": scan_that_is_not_read,
    "dead bias": overriding("model.alpha_init=0.0"),
    "faint bias": overriding("model.alpha_init=1e-5"),
    "unexpected loss": overriding("expect={val_loss: 0.3557, tolerance: 0.02}"),
    "NaN": loss_that_is_not_finite,
    "clock": skewed_clock,
    "altering file system": file_system_that_alters,
    "small disk": small_disk,
    "small GPU": small_gpu,
    "unwritable run_dir": unwritable_run_dir,
}


def parsed(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_intermixed_args(given)


quieten(0)
world = launch.join(2.0)
said = {}
for name, case in CASES.items():
    with case() as options:  # type: ignore[attr-defined]
        own = [] if any(option.startswith("run_dir=") for option in options) else [f"run_dir={FOLDER}/run"]
        given = parsed(["--config", str(CONFIG), *own, *options])
        said[name] = [[r.check, r.state, r.found, r.remedy] for r in examine(report.Subject(given, world))]
launch.leave()
print(json.dumps(said))
