"""The climatology against means taken one cell and hour of the day at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data import DataError
from data.channels import climatology
from data.store.layout import Store
from data.store.reader import ShardReader
from tests.launching import tiny_config
from trainer.config_file import load
from trainer.dataset import Dataset, open_climatology, open_dataset


@pytest.fixture
def dataset(tiny: Store, tmp_path: Path) -> Dataset:
    config = tiny_config(tmp_path, tiny.path, wind_scan={"mode": "none"})
    (tmp_path / "run").mkdir()
    return open_dataset(load(config, ["data.targets=[o3, pm25]"]), torch.device("cpu"))


@pytest.mark.parametrize("enough", [20, 5])
def test_means_are_those_of_the_hour_and_of_months_with_enough_days(
    enough: int, dataset: Dataset, tiny: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store has 9 days of January to train on; February gets the means of all months."""
    monkeypatch.setattr(climatology, "ENOUGH_DAYS", enough)
    usual = open_climatology(dataset)
    fields = ShardReader(tiny, "chemistry").read(np.flatnonzero(tiny.inside("train"))).astype("f8")
    found = usual.at(np.array([306, 317, 322]))
    assert found.shape == (3, 2, 16, 32)
    for row, valid in enumerate((306, 317, 322)):
        for column, channel in enumerate((5, 0)):
            expected = np.nanmean(fields[valid % 24 :: 24, channel], axis=0)
            np.testing.assert_allclose(found[row, column].numpy(), expected, rtol=1e-5)
    february = usual.at(np.array([24 * 31]))
    np.testing.assert_allclose(february[0, 1].numpy(), np.nanmean(fields[::24, 0], axis=0), rtol=1e-5)


def test_it_is_read_once_and_again_for_other_data(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_climatology(dataset)
    measured, calls = climatology._measured, []
    monkeypatch.setattr(climatology, "_measured", lambda given: calls.append(given) or measured(given))
    again = open_climatology(dataset)
    assert torch.equal(first.at(np.array([106])), again.at(np.array([106])))
    assert not calls
    object.__setattr__(dataset.store, "chosen", "other splits")
    open_climatology(dataset)
    assert len(calls) == 1


def test_means_that_were_changed_are_refused(dataset: Dataset) -> None:
    open_climatology(dataset)
    path = dataset.run.run_dir / climatology.FILE
    with np.load(path) as file:
        content = {name: file[name] for name in file.files}
    np.savez(path, **(content | {"means": content["means"] * 1.1}))
    with pytest.raises(DataError, match="is not what was measured"):
        open_climatology(dataset)
