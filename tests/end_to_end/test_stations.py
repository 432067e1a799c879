"""Observations of stations in three layouts, made from known values, cleaned, counted and scored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data import DataError
from data.given.stations import Observations, read
from data.store.layout import Store
from data.store.reader import ShardReader
from data.wind_scan.cache import ScanCache
from tests.launching import module, tiny_config, train
from trainer.forecaster import load_forecaster
from trainer.report.page import page
from trainer.verification.evaluation import Options, evaluate

TARGETS = ["pm25", "pm10", "so2", "no2", "co", "o3"]
NAMES = {"pm25": "PM2.5", "pm10": "PM10", "so2": "SO2", "no2": "NO2", "co": "CO", "o3": "O3"}
CELLS = {"1001A": (7, 20), "1002A": (8, 22), "1003A": (9, 19)}


@pytest.fixture(scope="module")
def hours(tiny: Store) -> np.ndarray:
    first, last = tiny.splits["test"][0]
    return np.arange(first, last)


@pytest.fixture(scope="module")
def observed(tiny: Store, hours: np.ndarray) -> np.ndarray:
    """(hours, T, S) ug m-3: the reanalysis, 10 % more, and a little noise."""
    fields = ShardReader(tiny, "chemistry").read(hours)
    rows, columns = (list(axis) for axis in zip(*CELLS.values(), strict=True))
    channels = [tiny.contents.channel(name) for name in TARGETS]
    values = fields[:, channels][:, :, rows, columns].astype("f8")
    noise = np.random.default_rng(0).uniform(0.01, 0.02, values.shape)
    return np.where(np.isfinite(values), 1.1 * values + noise * (1 + values), np.nan)


@pytest.fixture(scope="module")
def station_list(tiny: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stations") / "list.csv"
    rows = ["监测点编码,监测点名称,城市,经度,纬度"]
    for code, (row, column) in CELLS.items():
        rows.append(f"{code},x,y,{tiny.lon[column] + 0.2},{tiny.lat[row] - 0.3}")
    rows.append("1009A,far,away,10.0,50.0")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def times_of(tiny: Store, hours: np.ndarray) -> pd.DatetimeIndex:
    return pd.DatetimeIndex(tiny.times[hours].astype("datetime64[ns]"))


def write_cnemc(folder: Path, tiny: Store, hours: np.ndarray, observed: np.ndarray) -> Path:
    """A file a local day, as the mirrors of CNEMC's values have them."""
    folder.mkdir()
    local = times_of(tiny, hours) + pd.Timedelta(8, "h")
    for day in sorted(set(local.strftime("%Y%m%d"))):
        rows = ["date,hour,type," + ",".join([*CELLS, "1009A"])]
        for place in np.flatnonzero(local.strftime("%Y%m%d") == day):
            for channel, name in enumerate(TARGETS):
                values = observed[place, channel] / (1000.0 if name == "co" else 1.0)
                cells = ["" if np.isnan(x) else f"{x:.6f}" for x in values]
                rows.append(f"{day},{local[place].hour},{NAMES[name]}," + ",".join([*cells, "3.0"]))
            rows.append(f"{day},{local[place].hour},PM2.5_24h,1,1,1,1")
            rows.append(f"{day},{local[place].hour},AQI,50,50,50,50")
        (folder / f"china_sites_{day}.csv").write_text("\n".join(rows) + "\n")
    return folder


def write_openaq(path: Path, tiny: Store, hours: np.ndarray, observed: np.ndarray) -> Path:
    rows = []
    for place, time in enumerate(times_of(tiny, hours)):
        for channel, name in enumerate(TARGETS):
            for number, (code, (row, column)) in enumerate(CELLS.items()):
                value, unit = observed[place, channel, number], "µg/m³"
                if name == "no2":
                    value, unit = value * 24.465 / 46.0055 / 1000.0, "ppm"
                if np.isfinite(value):
                    stamp = (time + pd.Timedelta(8, "h")).strftime("%Y-%m-%dT%H:%M:%S+08:00")
                    where = (tiny.lat[row] - 0.3, tiny.lon[column] + 0.2)
                    rows.append((code, code, stamp, *where, name, unit, value))
    columns = ["location_id", "location", "datetimeUtc", "latitude", "longitude", "parameter", "unit", "value"]
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    return path


def write_long(path: Path, tiny: Store, hours: np.ndarray, observed: np.ndarray) -> Path:
    rows = []
    for place, time in enumerate(times_of(tiny, hours)):
        for channel, name in enumerate(TARGETS):
            for number, (code, (row, column)) in enumerate(CELLS.items()):
                where = (code, tiny.lat[row], tiny.lon[column])
                rows.append((time, *where, NAMES[name], observed[place, channel, number] / 1000.0, "mg m-3"))
    pd.DataFrame(rows, columns=["time", "station", "lat", "lon", "pollutant", "value", "unit"]).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("layout", ["cnemc", "openaq", "long"])
def test_every_layout_gives_the_values_that_were_measured(
    layout: str, tiny: Store, hours: np.ndarray, observed: np.ndarray, station_list: Path, tmp_path: Path
) -> None:
    write = {"cnemc": write_cnemc, "openaq": write_openaq, "long": write_long}[layout]
    given = write(tmp_path / f"{layout}.csv", tiny, hours, observed)
    found = read([given], station_list if layout == "cnemc" else None, tiny, TARGETS, hours)
    assert found.stations == list(CELLS)
    assert list(zip(found.rows.tolist(), found.columns.tolist(), strict=True)) == list(CELLS.values())
    np.testing.assert_allclose(found.at(hours), observed, rtol=1e-4, atol=2e-5)
    assert found.counted["used"] == np.isfinite(observed).sum()
    assert np.isnan(found.at(np.array([hours[-1] + 5]))).all()


def test_what_is_no_measurement_is_left_out_and_counted(
    tiny: Store, hours: np.ndarray, observed: np.ndarray, tmp_path: Path
) -> None:
    path = write_long(tmp_path / "long.csv", tiny, hours, observed)
    table = pd.read_csv(path)
    pm25 = table["pollutant"].eq("PM2.5") & table["station"].eq("1001A") & table["value"].notna()
    rows = table.index[pm25]
    table.loc[rows[0], "value"] = -0.001
    table.loc[rows[20:44], "value"] = 0.0123  # a day of equal values, if no hour between is missing
    stuck = table.loc[rows[20:44], "time"]
    whole = (pd.to_datetime(stuck).diff().dropna() == pd.Timedelta(1, "h")).all()
    again, other = table.loc[[rows[1]]], table.loc[[rows[2]]].assign(value=0.5)
    far = table.loc[[rows[3]]].assign(station="far", lat=-30.0)
    path2 = tmp_path / "worse.csv"
    pd.concat([table, again, other, far]).to_csv(path2, index=False)
    found = read([path2], None, tiny, TARGETS, hours)
    counted = found.counted
    assert (counted["negative"], counted["duplicates"], counted["contradictory"]) == (1, 1, 2)
    assert counted["stations outside the domain"] == 1
    assert counted["missing"] == int(np.isnan(observed).sum())
    assert whole
    assert counted["stuck"] == 24
    assert counted["used"] == np.isfinite(observed).sum() - 1 - 1 - 24
    own = found.at(hours)[:, 0, 0]
    times = times_of(tiny, hours)
    for row in (rows[0], rows[2], *rows[20:44]):
        assert np.isnan(own[times == pd.Timestamp(table.loc[row, "time"])]).all()


def test_values_within_an_hour_are_averaged_and_codes_keep_their_zeros(tiny: Store, hours: np.ndarray, tmp_path: Path) -> None:
    time = times_of(tiny, hours)[3]
    rows = [
        (time + pd.Timedelta(minute, "m"), "0012", "PM2.5", value, "ug m-3") for minute, value in ((0, 10), (15, 20), (30, 60))
    ]
    pd.DataFrame(rows, columns=["time", "station", "pollutant", "value", "unit"]).to_csv(tmp_path / "x.csv", index=False)
    (tmp_path / "list.csv").write_text(f"code,lat,lon\n0012,{tiny.lat[8]},{tiny.lon[20]}\n")
    found = read([tmp_path / "x.csv"], tmp_path / "list.csv", tiny, TARGETS, hours)
    assert found.stations == ["0012"]
    assert found.at(hours[[3]])[0, 0, 0] == pytest.approx(30.0)
    assert found.counted["averaged within hours"] == 2
    assert found.counted["contradictory"] == 0


@pytest.fixture(scope="module")
def trained(tiny_path: Path, tiny_scan: ScanCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    done = train(tiny_config(folder, tiny_path), "steps=2", "checkpoint.every=2", ranks=1)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_the_reanalysis_is_scored_at_the_stations_too(
    trained: Path, tiny: Store, hours: np.ndarray, observed: np.ndarray, station_list: Path, tmp_path: Path
) -> None:
    folder = write_cnemc(tmp_path / "cnemc", tiny, hours, observed)
    given = ("--stations", str(folder), "--station-list", str(station_list))
    done = module("trainer", "evaluate", str(trained), *given)
    assert done.returncode == 0, done.stderr
    assert "at 3 stations" in done.stdout
    assert "observations: 3 stations" in " ".join(done.stdout.split())
    evaluation = json.loads((trained / "evaluation-test.json").read_text())
    result = evaluation["stations"]
    index = load_forecaster(trained).dataset.index("test")
    fields = ShardReader(tiny, "chemistry").read(hours)
    rows, columns = (list(axis) for axis in zip(*CELLS.values(), strict=True))
    for channel, name in enumerate(TARGETS):
        analysed = fields[:, tiny.contents.channel(name)][:, rows, columns].astype("f8")
        for lead in (6, 12):
            t = index.t[index.lead == lead]
            now, then = t - hours[0], t + lead - hours[0]
            scores = result["scores"][name][f"{lead}h"]
            for kind, field in (("reanalysis", analysed[then]), ("persistence", analysed[now])):
                error = field - observed[then, channel]
                expected = np.sqrt(np.nanmean(error**2))
                assert scores[f"{kind}_rmse"] == pytest.approx(expected, rel=1e-4), (name, lead, kind)
    assert "RMSE of the reanalysis" in page("run", evaluation, "", [], {})


def test_tables_that_cannot_be_read_say_what_is_missing(
    trained: Path, tiny: Store, hours: np.ndarray, observed: np.ndarray, station_list: Path, tmp_path: Path
) -> None:
    def refused(text: str, said: str, listed: Path | None = None) -> None:
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(DataError, match=said):
            read([tmp_path / "x.csv"], listed, tiny, TARGETS, hours)

    head = "time,station,lat,lon,pollutant,value,unit\n"
    refused("a,b\n1,2\n", "has no column for time")
    refused(head + "2015-01-14T00,x,30,110,PM2.5,3,degC\n", "'degC', which cannot be turned into ug m-3")
    refused(head + "yesterday,x,30,110,PM2.5,3,ug m-3\n", "a time or a value is none")
    refused(head + "2015-01-14T00,x,-30,110,PM2.5,3,ug m-3\n", "has a place in the domain: give --station-list")
    refused(head + "2012-01-14T00,1001A,40,110,PM2.5,3,ug m-3\n", "no observation lies in the hours", station_list)
    refused("date,hour,type,1001A\n20150230,3,PM2.5,3\n", "a date, an hour or a value is none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no .csv or"):
        read([tmp_path / "empty"], None, tiny, TARGETS, hours)
    options = Options(stations=(write_long(tmp_path / "l.csv", tiny, hours, observed),))
    assert evaluate(load_forecaster(trained), options) is not None


def test_flags_packed_tables_chinese_lists_and_several_instruments(tiny: Store, hours: np.ndarray, tmp_path: Path) -> None:
    """Flagged values were used; folders of .csv.gz and lists in GBK refused; two instruments contradicted each other."""
    row, column = CELLS["1001A"]
    values = 20.0 + np.arange(len(hours)) % 7
    place = {"lat": tiny.lat[row], "lon": tiny.lon[column]}
    table = pd.DataFrame(
        {"time": times_of(tiny, hours), "station": "1001A", "pollutant": "pm25", "value": values, "unit": "ug/m3"}
    )

    def found(written: pd.DataFrame, name: str) -> Observations:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        written.to_csv(tmp_path / name, index=False)
        return read([(tmp_path / name).parent], None, tiny, ["pm25"], hours)

    flags = np.where(np.arange(len(hours)) < 10, -1, 1)
    flagged = found(table.assign(**place, Validity=flags, value=np.where(flags < 0, 500.0, values)), "flags/a.csv")
    assert np.isnan(flagged.values[:10]).all()
    assert (flagged.counted["flagged as not valid"], flagged.counted["used"]) == (10, len(hours) - 10)
    with pytest.raises(DataError, match="its flags are no numbers"):
        found(table.assign(**place, flag="V"), "letters/a.csv")
    packed = found(table.assign(**place), "packed/location-1.csv.gz")
    np.testing.assert_allclose(packed.values[:, 0, 0], values)
    two = found(pd.concat([table, table.assign(value=values * 1.02)]).assign(**place), "two/a.csv")
    np.testing.assert_allclose(two.values[:, 0, 0], values * 1.01, rtol=1e-6)
    torn = found(pd.concat([table, table.assign(value=values * np.where(flags < 0, 9.0, 1.0))]).assign(**place), "torn/a.csv")
    assert torn.counted["contradictory"] == 20
    chinese = pd.DataFrame({"监测点编码": ["1001A"], "纬度": [place["lat"]], "经度": [place["lon"]]})
    chinese.to_csv(tmp_path / "list.csv", index=False, encoding="gbk")
    table.to_csv(tmp_path / "plain.csv", index=False)
    np.testing.assert_allclose(
        read([tmp_path / "plain.csv"], tmp_path / "list.csv", tiny, ["pm25"], hours).values[:, 0, 0], values
    )
