"""Runs that follow the air: exact over stops and ranks, the same from a store, from memory and along forecast winds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import load_file

from data.store.layout import Store
from data.store.opening import open_store
from data.store.reader import ShardReader
from data.wind_paths import cache
from tests.launching import losses, module, tiny_config, train, train_several
from trainer import load_forecaster
from trainer.config import InitFrom
from trainer.forecaster import forecast
from trainer.forecaster import load_forecaster as load_with_store
from trainer.weights.fit import network_of
from trainer.weights.reading import read

SOURCES = ["one", "wind", "dust", "night", "season_cos", "season_sin"]
STEPS = ("steps=12", "schedule.decay_steps=12")


@pytest.fixture(scope="module")
def config(tiny: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paths")
    cache.build(tiny, folder / "tiny.wind_paths", patch=2, hours=12)
    data = {"store": str(tiny.path), "lead_hours": [6, 12], "derived": ["carried", "exposure"], "future": ["u", "v"]}
    model = {"grid": [16, 32], "width": 32, "depth": 2, "heads": 4, "dropout": 0.1, "drop_path": 0.1}
    model |= {"sources": SOURCES, "predict": "change", "elevation_bias": "none"}
    paths = {"cache": str(folder / "tiny.wind_paths")}
    return tiny_config(folder, tiny.path, data=data, model=model, wind_scan={"mode": "none"}, wind_paths=paths)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/step-00000012/weights.safetensors")


def in_parts(config: Path, zero: str, *more: str) -> tuple[Path, Path]:
    """Twelve steps by two ranks at once, and stopped after five."""
    whole, parts = config.parent / f"whole{zero}{len(more)}", config.parent / f"parts{zero}{len(more)}"
    lengths = [(whole, 12), (parts, 5), (parts, 12)]
    jobs = [
        {"zero": zero, "overrides": [f"run_dir={run}", *STEPS, f"steps={steps}", "ema=0.9", *more]} for run, steps in lengths
    ]
    train_several(config, jobs)
    return whole, parts


@pytest.mark.parametrize("zero", ["1", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("0", "2", "3"))])
def test_stopped_and_continued_it_is_the_same_run_to_the_bit(config: Path, zero: str) -> None:
    whole, parts = in_parts(config, zero)
    assert losses(parts) == losses(whole)
    ours, truth = weights(parts), weights(whole)
    assert all(torch.equal(ours[name], truth[name]) for name in truth)
    assert truth["sources.source_maps"].abs().max() > 0
    assert (truth["sources.log_lifetime"] != np.float32(np.log(24.0))).any()


@pytest.mark.slow
def test_in_bf16_too(config: Path) -> None:
    whole, parts = in_parts(config, "1", "precision=bf16")
    assert losses(parts) == losses(whole)


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    done = train(config, "run_dir=" + str(config.parent / "run"), *STEPS, ranks=1)
    assert done.returncode == 0, done.stderr
    return config.parent / "run"


def test_the_checkpoint_knows_the_paths_and_other_ones_are_refused(config: Path, trained: Path, tiny: Store) -> None:
    cache.build(tiny, config.parent / "longer", patch=2, hours=24)
    done = train(config, f"run_dir={trained}", *STEPS, "steps=13", f"wind_paths.cache={config.parent / 'longer'}", ranks=1)
    assert done.returncode != 0
    assert "wind_paths" in done.stderr


def test_sources_are_found_again_by_the_names_of_targets_and_factors(trained: Path) -> None:
    """By position a run with other orders would have started with permuted maps."""
    weights, run = read(trained), load_with_store(trained).run
    targets, factors = run.data.targets[::-1][:3], ["night", "one"]
    other = run.model_copy(
        update={
            "data": run.data.model_copy(update={"targets": targets}),
            "model": run.model.model_copy(update={"sources": factors}),
        }
    )
    network, _ = network_of(weights, other, InitFrom(path=trained))
    before, sources = weights.tensors["sources.source_maps"], network.sources
    assert sources is not None
    for row, target in enumerate(targets):
        assert sources.log_lifetime[row] == weights.tensors["sources.log_lifetime"][run.data.targets.index(target)]
        for column, factor in enumerate(factors):
            expected = before[run.data.targets.index(target), SOURCES.index(factor)]
            assert torch.equal(sources.source_maps[row, column], expected)


def test_a_forecast_from_memory_is_that_from_the_store(trained: Path, tiny: Store) -> None:
    """Along the winds that are given, without a cache."""
    hours = np.arange(250, 264)
    coordinates = {"time": tiny.times[hours].astype("datetime64[ns]"), "lat": tiny.lat, "lon": tiny.lon}
    variables = {
        variable.name: (tuple(coordinates), fields[:, channel], {"units": variable.units})
        for group in ("weather", "chemistry")
        for fields in [ShardReader(tiny, group).read(hours)]
        for channel, variable in enumerate(tiny.contents.groups[group])
    }
    ours = load_forecaster(trained).predict(xr.Dataset(variables, coordinates))
    by_store = load_with_store(trained)
    assert ours.sizes["time"] == 2
    for place in (0, 1):
        _, expected = forecast(by_store, 250 + place, [6, 12])
        for channel, name in enumerate(by_store.dataset.normalizer.targets):
            np.testing.assert_allclose(ours[name][place], expected[:, channel].cpu(), rtol=2e-4, atol=1e-3, err_msg=name)


def test_winds_of_a_forecast_carry_the_air_in_an_evaluation(trained: Path, tiny: Store, tmp_path: Path) -> None:
    """The same winds under another name give the same scores; the sources are drawn, and written in ug m-3 h-1."""
    other = Path(shutil.copytree(tiny.path, tmp_path / "forecast.zarr"))
    assert open_store(other).fingerprint == tiny.fingerprint
    scores = []
    for more in ([], ["--future-from", str(other)]):
        done = module("trainer", "evaluate", str(trained), "--samples", "24", *more)
        assert done.returncode == 0, done.stderr
        scores.append(json.loads((trained / "evaluation-test.json").read_text())["scores"])
    assert scores[0] == scores[1]
    done = module("trainer", "plot", str(trained))
    assert done.returncode == 0, done.stderr
    found = xr.open_dataset(trained / "plots/sources.nc")
    layer, std = weights(trained)["sources.source_maps"], tiny.statistics["o3"]["std"]
    np.testing.assert_allclose(found["source_o3"], layer[5] * np.float32(std), rtol=1e-5, atol=1e-6)
    assert found["lifetime_so2"].attrs["units"] == "h"
    assert (trained / "plots/sources.png").stat().st_size > 1000
