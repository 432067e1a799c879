"""GRIB by an index of its messages: whatever their order, scanning and gaps, each value stands at its place and hour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import eccodes
import numpy as np
import pytest

from data import DataError
from data.prepare.inputs.opening import opened
from data.prepare.sources.coordinates import coordinates, layout
from data.prepare.sources.source import Clock
from data.prepare.sources.times import valid_hours

LAT, LON = np.arange(36.0, 31.9, -1.0), np.arange(106.0, 112.1, 1.0)


def truth(hour: int) -> np.ndarray:
    """(H, W), from the north and from the west."""
    return np.asarray(280.0 + LAT[:, None] + 2 * LON[None] + 0.5 * hour)


def write(path: Path, *messages: dict[str, Any]) -> Path:
    """A message for each: its hour, step, and keys of eccodes."""
    with path.open("wb") as file:
        for about in messages:
            keys = {"hour": 0, "step": 0, "times": 1.0, "paramId": 167} | about
            hour, step, times = keys.pop("hour"), keys.pop("step"), keys.pop("times")
            handle = eccodes.codes_grib_new_from_samples("regular_ll_sfc_grib2")
            placed = {
                "Ni": len(LON),
                "Nj": len(LAT),
                "iDirectionIncrementInDegrees": 1.0,
                "jDirectionIncrementInDegrees": 1.0,
                "latitudeOfFirstGridPointInDegrees": LAT[0],
                "latitudeOfLastGridPointInDegrees": LAT[-1],
                "longitudeOfFirstGridPointInDegrees": LON[0],
                "longitudeOfLastGridPointInDegrees": LON[-1],
                "dataDate": 20150301,
                "dataTime": 100 * hour,
                "step": step,
                "bitsPerValue": 24,
            }
            for key, value in (placed | keys).items():
                eccodes.codes_set(handle, key, value)
            values = truth(hour + step) * times
            eccodes.codes_set_values(handle, (values.T if keys.get("jPointsAreConsecutive") else values).ravel())
            eccodes.codes_write(handle, file)
            eccodes.codes_release(handle)
    return path


def read(
    path: Path, name: str = "t2m", level: float | None = None, lead: tuple[float, ...] | None = None
) -> dict[int, np.ndarray]:
    """Hour of 1 March 2015 -> (H, W)."""
    with opened(path) as dataset:
        place, found = coordinates(dataset, name, path), valid_hours(dataset, name, path, Clock(lead_hours=lead))
        how = layout(dataset, name, place, found, level, path, name)
        np.testing.assert_allclose(place.grid.lat, LAT)
        np.testing.assert_allclose(place.grid.lon, LON)
        values = dataset[name].isel(dict(how.at)).transpose(*how.times, how.y, how.x).to_numpy()
    hours = (found.valid - np.datetime64("2015-03-01", "h")).astype(int).tolist()
    return {hour: values[where] for hour, where in zip(hours, found.places, strict=True)}


def agree(found: dict[int, np.ndarray], hours: list[int], times: float = 1.0) -> None:
    assert sorted(found) == hours
    for hour in hours:
        np.testing.assert_allclose(found[hour], truth(hour) * times, rtol=1e-5)


def test_messages_in_any_order_and_scanning(tmp_path: Path) -> None:
    """Columns first was read as rows."""
    agree(read(write(tmp_path / "a.grib", {"hour": 6}, {"hour": 0}, {"hour": 12}, {"hour": 3})), [0, 3, 6, 12])
    columns = [{"hour": hour, "jPointsAreConsecutive": 1} for hour in (0, 3)]
    agree(read(write(tmp_path / "b.grib", *columns)), [0, 3])


def test_an_hour_that_is_missing_moves_no_other(tmp_path: Path) -> None:
    """Of one field; the others have it. Of levels, a message that is not there is missing."""
    path = write(tmp_path / "a.grib", {"hour": 0}, {"hour": 6}, *({"hour": h, "paramId": 168} for h in (0, 3, 6)))
    agree(read(path), [0, 6])
    agree(read(path, "d2m"), [0, 3, 6])
    on_levels = {"typeOfLevel": "isobaricInhPa", "paramId": 130}
    path = write(
        tmp_path / "b.grib",
        {"hour": 0, **on_levels, "level": 1000},
        {"hour": 0, "times": 0.9, **on_levels, "level": 850},
        {"hour": 3, "times": 0.9, **on_levels, "level": 850},
    )
    agree(read(path, "t", 850), [0, 3], 0.9)
    lowest = read(path, "t", 1000)
    agree({0: lowest[0]}, [0])
    assert np.isnan(lowest[3]).all()


def test_forecasts_are_valid_after_their_step(tmp_path: Path) -> None:
    path = write(tmp_path / "a.grib", *({"hour": hour, "step": step} for hour in (0, 12) for step in (3, 6)))
    agree(read(path), [3, 6, 15, 18])
    agree(read(path, lead=(6.0,)), [6, 18])


def test_what_is_not_one_field_is_refused_or_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds 't2m' at 2015-03-01T03:00 twice"):
        read(write(tmp_path / "a.grib", {"hour": 3}, {"hour": 3, "times": 1.1}))
    kinds = [{"typeOfLevel": kind, "level": 1, "paramId": 130} for kind in ("isobaricInhPa", "hybrid")]
    with opened(write(tmp_path / "b.grib", *kinds)) as dataset:
        assert sorted(map(str, dataset.data_vars)) == ["t_hybrid", "t_isobaricInhPa"]
    with pytest.raises(DataError, match=r"'tp?2?m?' is on several grids"):
        read(
            write(
                tmp_path / "c.grib",
                {"hour": 0},
                {"hour": 3, "Nj": 5, "jDirectionIncrementInDegrees": 0.5, "latitudeOfLastGridPointInDegrees": 34.0},
            )
        )
    whole = write(tmp_path / "d.grib", {"hour": 0}, {"hour": 3}).read_bytes()
    (tmp_path / "cut.grib").write_bytes(whole[:-20])
    with pytest.raises(DataError, match="is damaged or cut off GRIB"):
        read(tmp_path / "cut.grib")
