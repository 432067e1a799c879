"""Daily values, indices, events, spectra and regions against loops over hours, cells and coefficients."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from data import DataError
from data.given.regions import regions_of
from data.store.layout import Store
from trainer.verification import days, pieces
from trainer.verification.days import Days, contingency, daily_mean, largest_of_eight_hours, of_days
from trainer.verification.spectra import Spectra
from trainer.verification.standards import CLASSES, class_of, standards
from trainer.verification.summary import event_scores

LIMITS, INDICES = standards()


def obvious_daily(hours: np.ndarray, ozone: bool) -> float:
    """Mean of 20 hours or more; of ozone the largest mean of eight hours with six or more, 14 such means or more."""
    if not ozone:
        known = hours[np.isfinite(hours)]
        return float(known.mean()) if len(known) >= 20 else math.nan
    means = []
    for end in range(8, 25):
        window = hours[end - 8 : end]
        known = window[np.isfinite(window)]
        if len(known) >= 6:
            means.append(known.mean())
    return float(max(means)) if len(means) >= 14 else math.nan


def test_daily_values_are_those_of_a_loop_over_hours() -> None:
    rng = np.random.default_rng(0)
    hours = rng.gamma(2.0, 40.0, (24, 60))
    for cell in range(60):
        hours[rng.permutation(24)[: cell % 9], cell] = np.nan
    means, largest = (function(torch.from_numpy(hours)).numpy() for function in (daily_mean, largest_of_eight_hours))
    for cell in range(60):
        assert means[cell] == pytest.approx(obvious_daily(hours[:, cell], False), nan_ok=True)
        assert largest[cell] == pytest.approx(obvious_daily(hours[:, cell], True), nan_ok=True)
    assert np.isnan(means).any()
    assert np.isnan(largest).any()


def obvious_index(index, pollutant: str, value: float) -> int:
    breaks = index.breaks[pollutant]
    if value >= breaks[-1]:
        return int(index.points[len(breaks) - 1])
    place = max(i for i, edge in enumerate(breaks) if edge <= value)
    low, high = breaks[place], breaks[place + 1]
    exact = (value - low) / (high - low) * (index.points[place + 1] - index.points[place]) + index.points[place]
    return math.ceil(round(exact, 9))


@pytest.mark.parametrize("index", INDICES, ids=lambda index: index.standard)
def test_an_individual_index_is_interpolated_between_break_points_and_rounded_up(index) -> None:
    rng = np.random.default_rng(1)
    for pollutant, breaks in index.breaks.items():
        values = np.concatenate([breaks, rng.uniform(0, 1.2 * breaks[-1], 300)])
        ours = index.individual(pollutant, torch.from_numpy(values)).numpy()
        assert ours.tolist() == [obvious_index(index, pollutant, value) for value in values.tolist()], pollutant
    assert torch.isnan(index.individual("pm25", torch.tensor([math.nan])))[0]


def test_the_two_regulations_differ_where_they_should() -> None:
    """Published examples of the break points: PM2.5 of 75 and PM10 of 150 were the end of 'good' until 2026."""
    old, new = INDICES
    day = torch.tensor([60.0, 75.0, 76.0])
    assert old.individual("pm25", day).tolist() == [82.0, 100.0, 102.0]  # 50 + 50 * 25/40 = 81.25; 100 + 50/40 = 101.25
    assert new.individual("pm25", day).tolist() == [100.0, 114.0, 115.0]  # 100 + 50 * 15/55 = 113.6; 114.5
    assert new.individual("pm10", torch.tensor([120.0])).item() == 100.0
    ends = torch.tensor([0.0, 50.0, 51.0, 150.0, 151.0, 300.0, 301.0, 500.0])
    assert class_of(ends).tolist() == [0, 0, 1, 2, 3, 4, 5, 5]
    assert len(CLASSES) == 6


def test_events_are_counted_as_by_a_loop_over_cells() -> None:
    rng = np.random.default_rng(2)
    forecast, truth = rng.normal(50, 30, (2, 3, 5, 6))
    truth[rng.random(truth.shape) < 0.2] = np.nan
    weights = rng.random((2, 5, 6))
    both = (torch.from_numpy(np.stack([a, 2 * a], 1)) for a in (forecast, truth))
    ours = contingency(*both, torch.tensor([60.0, 120.0]), torch.from_numpy(weights)).numpy()
    np.testing.assert_allclose(ours[:, 0], ours[:, 1])
    for sample in range(3):
        for region in range(2):
            counted = [0.0, 0.0, 0.0, 0.0]
            for cell in np.ndindex(5, 6):
                if np.isfinite(truth[sample][cell]):
                    kind = (forecast[sample][cell] > 60) + 2 * (truth[sample][cell] > 60)
                    counted[kind] += weights[region][cell]
            np.testing.assert_allclose(ours[sample, 0, region], counted)
    scores = event_scores([50.0, 10.0, 15.0, 25.0])
    assert scores == pytest.approx(
        {"base_rate": 0.4, "pod": 25 / 40, "far": 10 / 35, "csi": 0.5, "ets": (25 - 14) / (50 - 14), "frequency_bias": 35 / 40}
    )
    assert event_scores([10.0, 0.0, 0.0, 0.0])["pod"] is None


def test_a_day_is_scored_once_all_its_hours_are_there() -> None:
    """Daily scores, classes and primary pollutants of two lead times against loops over cells of two days."""
    rng = np.random.default_rng(3)
    targets, leads, grid = ["pm25", "no2", "o3"], [12, 24], (2, 3)
    fields = rng.gamma(2.0, 60.0, (3, 2, 2, 24, 3, *grid)).astype("f4")  # system, day, lead, hour, target
    fields[2, :, 1] = fields[2, :, 0]  # the truth does not know lead times
    fields[0, 1, 1, 5:] = np.nan  # the second day of 24 h has five hours only
    weights = torch.from_numpy(rng.random((2, *grid)))
    limits = of_days(LIMITS, targets)
    assert {limit.averaging for limit in limits if limit.pollutant == "o3"} == {"8 h"}
    means = torch.tensor([90.0, 80.0, 70.0])[:, None, None]
    ours = Days(targets, leads, weights, 2, limits, INDICES, means)
    for day in range(2):
        for hour in rng.permutation(24):
            for row, lead in enumerate(leads):
                if np.isfinite(fields[0, day, row, hour]).all():
                    ours.add(day, int(hour), lead, *(torch.from_numpy(fields[s, day, row, hour]) for s in (0, 1, 2)))
    ours.close()

    def daily(system: int, day: int, row: int, target: int, cell: tuple[int, ...]) -> float:
        return obvious_daily(fields[(system, day, row, slice(None), target, *cell)].astype("f8"), targets[target] == "o3")

    complete = [(0, 0), (1, 0), (0, 1)]  # day, row of the lead time
    for row in range(2):
        of_lead = [(day, r) for day, r in complete if r == row]
        area = weights[1].numpy()
        pairs = [(area[c], daily(0, d, r, 0, c), daily(2, d, r, 0, c)) for d, r in of_lead for c in np.ndindex(grid)]
        a, f, t = np.array(pairs).T
        scores = ours.errors.table(1)
        assert float(scores["rmse"][0, row]) == pytest.approx(math.sqrt((a * (f - t) ** 2).sum() / a.sum()), rel=1e-6)
        agreement = 1 - (a * (f - t) ** 2).sum() / (a * (abs(f - 90) + abs(t - 90)) ** 2).sum()
        assert float(scores["ioa"][0, row]) == pytest.approx(agreement, rel=1e-6)
        for number, limit in enumerate(limits):
            target = targets.index(limit.pollutant)
            hits = sum(
                area[c] * (daily(0, d, r, target, c) > limit.value and daily(2, d, r, target, c) > limit.value)
                for d, r in of_lead
                for c in np.ndindex(grid)
            )
            assert float(ours.sums["daily_events"][number, 0, row, 1, 3]) == pytest.approx(hits)
        for number, index in enumerate(INDICES):
            table, right, errors = np.zeros((6, 6)), np.zeros(2), np.zeros(3)
            for d, r in of_lead:
                for c in np.ndindex(grid):
                    both = [[obvious_index(index, n, daily(s, d, r, t, c)) for t, n in enumerate(targets)] for s in (0, 2)]
                    ours_whole, truth_whole = (max(parts) for parts in both)
                    ends = (50, 100, 150, 200, 300)
                    table[sum(truth_whole > e for e in ends), sum(ours_whole > e for e in ends)] += area[c]
                    errors += area[c] * np.array([1, ours_whole - truth_whole, abs(ours_whole - truth_whole)])
                    if truth_whole > 50:
                        right += area[c] * np.array([1, both[1][int(np.argmax(both[0]))] == truth_whole])
            np.testing.assert_allclose(ours.sums["index_classes"][number, 0, row, 1], table, atol=1e-12)
            np.testing.assert_allclose(ours.sums["index_errors"][number, 0, row, 1], errors)
            np.testing.assert_allclose(ours.sums["primary"][number, 0, row, 1], right)
    reliability = ours.sums["reliability"].numpy()
    for number, limit in enumerate(limits):
        target, expected = targets.index(limit.pollutant), np.zeros((len(days.RATIOS) + 1, 2))
        for day in range(2):
            for c in np.ndindex(grid):
                ratio = daily(0, day, 0, target, c) / limit.value
                exceeded = daily(2, day, 0, target, c) > limit.value
                expected[sum(ratio > edge for edge in days.RATIOS)] += float(weights[0][c]) * np.array([1, exceeded])
        np.testing.assert_allclose(reliability[number, 0], expected, atol=1e-12)


def test_a_wave_has_its_variance_at_its_own_length(tiny: Store) -> None:
    """A cosine of the transform's own basis, and Parseval's sum over all scales."""
    spectra = Spectra(tiny, torch.device("cpu"))
    rows, cols = tiny.grid
    north = torch.cos(math.pi * 6 * (torch.arange(rows) + 0.5) / rows)[:, None].expand(rows, cols)
    fields = torch.stack([7.0 + 3.0 * north, torch.full((rows, cols), 4.0)])[None]
    of = spectra.of(fields, torch.ones(fields.shape, dtype=torch.bool))[0]
    height = abs(tiny.lat[1] - tiny.lat[0]) * 111.195
    wavelength = 2 * rows * height / 6
    nearest = int(np.argmin([abs(math.log(w / wavelength)) for w in spectra.wavelengths]))
    assert float(of[0, nearest]) == pytest.approx(4.5, rel=1e-4)  # 3^2 / 2
    assert float(of[0].sum()) == pytest.approx(4.5, rel=1e-4)
    assert float(of[1].abs().max()) < 1e-8


def test_what_is_unknown_does_not_show_in_a_spectrum(tiny: Store) -> None:
    spectra, rng = Spectra(tiny, torch.device("cpu")), torch.Generator().manual_seed(0)
    field = torch.randn((1, 1, *tiny.grid), generator=rng)
    known = torch.rand(field.shape, generator=rng) > 0.2
    other = torch.where(known, field, torch.nan)
    torch.testing.assert_close(spectra.of(field, known), spectra.of(other, known))


def _square(store: Store, row: int, column: int) -> dict:
    """Around two by two cells."""
    south, north = store.lat[row + 1] - 0.1, store.lat[row] + 0.1
    west, east = store.lon[column] - 0.1, store.lon[column + 1] + 0.1
    corners = ((west, south), (east, south), (east, north), (west, north), (west, south))
    return {"type": "Polygon", "coordinates": [[[float(x), float(y)] for x, y in corners]]}


def test_regions_are_bands_of_height_or_named_polygons(tiny: Store, tmp_path: Path) -> None:
    found = regions_of(tiny, None)
    height, inside = tiny.static["elevation"], tiny.static["domain_mask"] > 0
    assert list(found)[0] == "domain"
    assert (sum(found[name].astype(int) for name in found if name != "domain") == inside).all()
    assert (height[found["plains"]] < 500).all()
    assert (height[found["plateau"]] > 2500).all()
    west, east, north, south = tiny.lon[3] - 0.1, tiny.lon[6] + 0.1, tiny.lat[2] + 0.1, tiny.lat[4] - 0.1
    box = [[float(x), float(y)] for x, y in ((west, south), (east, south), (east, north), (west, north), (west, south))]
    polygon = {"type": "Polygon", "coordinates": [box]}
    path = tmp_path / "regions.geojson"

    def write(name: str, geometry: object) -> Path:
        feature = {"type": "Feature", "properties": {"name": name}, "geometry": geometry}
        path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
        return path

    expected = np.zeros(tiny.grid, bool)
    expected[2:5, 3:7] = True
    assert (regions_of(tiny, write("basin", polygon))["basin"] == (expected & inside)).all()
    two = [{"type": "Feature", "properties": {"name": "both"}, "geometry": g} for g in (polygon, _square(tiny, 10, 12))]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": two}))
    both = expected.copy()
    both[10:12, 12:14] = True
    assert (regions_of(tiny, path)["both"] == (both & inside)).all()
    far = {"type": "Polygon", "coordinates": [[[0, 0], [1, 0], [1, 1], [0, 0]]]}
    for name, geometry, said in (
        ("far", far, "no cell"),
        ("domain", polygon, "of the name 'domain'"),
        ("x", 3, "is not a"),
    ):
        with pytest.raises(DataError, match=said):
            regions_of(tiny, write(name, geometry))


def test_pieces_are_cut_between_days() -> None:
    day = np.sort(np.random.default_rng(4).integers(0, 40, 3000))
    parts = pieces.cut(day)
    assert np.concatenate([np.arange(3000)[part] for part in parts]).tolist() == list(range(3000))
    for before, after in pairwise(parts):
        assert day[before.stop - 1] < day[after.start]
    assert len(parts) <= pieces.MOST
    assert pieces.cut(np.zeros(1000, int)) == [slice(0, 1000)]
