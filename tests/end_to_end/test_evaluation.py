"""An evaluation is the same to the bit on any number of ranks and after an interruption; its baselines are what they say."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr

from data import DataError
from data.store.reader import ShardReader
from data.wind_scan.cache import ScanCache
from tests.launching import as_rank, module, ranks_of, run, tiny_config, train
from trainer.dataset import open_climatology
from trainer.forecaster import Forecaster, load_forecaster
from trainer.report.page import page
from trainer.scores.errors import ErrorSums, normalised_loss
from trainer.verification import evaluation, pieces
from trainer.verification.evaluation import Evaluation, Options, evaluate


@pytest.fixture(scope="module")
def trained(tiny_path: Path, tiny_scan: ScanCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    done = train(tiny_config(folder, tiny_path), "steps=2", "checkpoint.every=2", "model.predict=change", ranks=1)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def forecaster(trained: Path) -> Forecaster:
    return load_forecaster(trained)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a day."""
    monkeypatch.setattr(pieces, "SMALLEST", 16)


def test_on_another_device_the_scores_are_made_on_the_host(forecaster: Forecaster) -> None:
    """What is summed up comes back as numpy arrays; what it is compared with may still lie on a GPU ("meta" stands for one)."""
    sums = ErrorSums(6, [6, 12], torch.device("cpu"))
    normalizer = SimpleNamespace(target_std=forecaster.dataset.normalizer.target_std.double())
    expected = normalised_loss(sums, normalizer)  # type: ignore[arg-type]
    assert np.isnan(expected)
    moved: list[torch.device] = []

    class Elsewhere(torch.Tensor):
        def to(self, device: torch.device) -> torch.Tensor:
            moved.append(device)
            return torch.ones(6)

    elsewhere = SimpleNamespace(target_std=normalizer.target_std.as_subclass(Elsewhere))
    normalised_loss(sums, elsewhere)  # type: ignore[arg-type]
    assert moved == [torch.device("cpu")]


def on_ranks(count: int, forecaster: Forecaster, monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    """What rank 0 has after the others have done their share."""
    for rank in reversed(range(count)):
        as_rank(monkeypatch, rank, count)
        done = evaluate(forecaster, Options())
        assert (done is None) == (rank > 0)
    assert done is not None
    assert (done.parts / "0000.npz").exists()
    pieces.discard(done.parts)
    return done


@pytest.mark.usefixtures("small")
def test_one_two_and_four_ranks_give_the_same(forecaster: Forecaster, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, four = (on_ranks(count, forecaster, monkeypatch) for count in (1, 2, 4))
    assert one.scores == two.scores == four.scores
    for name, values in one.maps.items():
        np.testing.assert_array_equal(values, four.maps[name])
    assert one.scores["daily"]["days"] > 0
    assert set(one.scores["regions"]) >= {"plains", "slopes"}
    assert not list(forecaster.run.run_dir.glob("evaluation-*.parts/*"))


@pytest.mark.usefixtures("small")
def test_an_interrupted_one_goes_on_where_it_was(forecaster: Forecaster, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = on_ranks(1, forecaster, monkeypatch)
    made: list[int] = []
    own = evaluation.tally

    def interrupted(*arguments: object) -> object:
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return own(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation, "tally", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(forecaster, Options())
    (folder,) = (forecaster.run.run_dir / "evaluation-test.parts").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["0000.npz", "0001.npz"]
    again = on_ranks(1, forecaster, monkeypatch)
    assert again.scores == whole.scores
    assert len(made) > 3


def test_a_forecast_that_is_not_finite_is_an_error(trained: Path) -> None:
    broken = load_forecaster(trained)
    with torch.no_grad():
        broken.model.norm.bias[0] = torch.nan
    with pytest.raises(DataError, match="is not finite"):
        evaluate(broken, Options(samples=4))


def test_what_lies_outside_the_domain_changes_no_score(forecaster: Forecaster) -> None:
    dataset = forecaster.dataset
    index = dataset.index("test")
    setting, numbers, _ = evaluation.setting_of(forecaster, index, Options())
    outside = torch.from_numpy(~setting.regions["domain"])
    assert outside.any()

    def wild(*arguments: torch.Tensor) -> torch.Tensor:
        return forecaster.model(*arguments) + 5.0 * outside

    parts = [
        evaluation.tally(model, dataset.stream(index).listed(numbers[:16], 4), np.arange(16), setting)
        for model in (forecaster.model, wild)
    ]
    for name in set(parts[0]) - {"maps"}:  # maps are masked when they are drawn from the sums
        np.testing.assert_allclose(parts[0][name], parts[1][name], err_msg=name)


@pytest.mark.usefixtures("small")
def test_pieces_of_another_evaluation_are_not_mixed_in(forecaster: Forecaster, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 1, 2)
    evaluate(forecaster, Options(utc_offset=0))
    whole = on_ranks(1, forecaster, monkeypatch)
    assert whole.scores["utc_offset"] == 8
    assert whole.scores == on_ranks(1, forecaster, monkeypatch).scores


def test_a_rank_that_does_not_come_is_named(forecaster: Forecaster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "SMALLEST", 16)
    monkeypatch.setattr(pieces, "WAIT_S", 0.2)
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(evaluation.pieces.DataError, match=r"0001.npz did not come within 0 s; rank 1 has to write it"):
        evaluate(forecaster, Options())


def test_real_ranks_write_one_file_and_only_rank_0_talks(trained: Path) -> None:
    alone = module("trainer", "evaluate", str(trained))
    assert alone.returncode == 0, alone.stderr
    expected = json.loads((trained / "evaluation-test.json").read_text())
    done = ranks_of(["-m", "trainer", "evaluate", str(trained)], 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert json.loads((trained / "evaluation-test.json").read_text()) == expected


def test_a_few_samples_say_that_they_make_no_day(trained: Path) -> None:
    done = module("trainer", "evaluate", str(trained), "--samples", "12")
    assert done.returncode == 0, done.stderr
    assert "daily values: none" in done.stdout


def test_the_best_mix_is_the_least_squares_share_of_the_anomaly(forecaster: Forecaster) -> None:
    """Against numpy's least squares over the same samples, and against both that it mixes."""
    dataset = forecaster.dataset
    usual = open_climatology(dataset)
    index = dataset.index("train")
    numbers = index.evenly(evaluation.SAMPLES)
    area = np.sqrt(dataset.normalizer.area.numpy())
    pairs = []
    for raw in dataset.stream(index).listed(numbers, 8):
        batch, _, _ = dataset.prepare(raw)
        for slot in np.flatnonzero(batch.counted & (batch.lead_hours == 12)):
            before, truth = (f(batch)[slot, 0].numpy() for f in (dataset.normalizer.persistence, dataset.normalizer.truth))
            now, then = (usual.at(hours)[slot, 0].numpy() for hours in (batch.hours, batch.valid_hours))
            known = np.isfinite(before) & np.isfinite(truth)
            pairs.append(np.stack([((before - now) * area)[known], ((truth - then) * area)[known]]))
    anomaly, wanted = np.concatenate(pairs, 1)
    share = np.linalg.lstsq(anomaly[:, None], wanted, rcond=None)[0][0]
    mix = evaluation.baselines(dataset, usual)["mix"]
    raw = next(dataset.stream(index).listed(np.flatnonzero(index.lead == 12)[:1], 1))
    batch, _, _ = dataset.prepare(raw)
    before = dataset.normalizer.persistence(batch)[0, 0]
    now, then = (usual.at(hours)[0, 0] for hours in (batch.hours, batch.valid_hours))
    expected = (then + share * (before - now)).clamp(min=0.0)
    expected = torch.where(torch.isfinite(before), expected, torch.nan)
    torch.testing.assert_close(mix(batch)[0, 0], expected, rtol=1e-3, atol=1e-2, equal_nan=True)


@pytest.fixture(scope="module")
def report(trained: Path) -> Path:
    for command in ("evaluate", "report"):
        done = module("trainer", command, str(trained))
        assert done.returncode == 0, done.stderr
    return trained / "report-test.html"


def test_the_report_is_one_small_file_with_everything_in_it(report: Path) -> None:
    text = report.read_text()
    assert len(text) < 5e6
    assert "<script" not in text
    outside = re.findall(r'(?:src|href)="(?!data:image/png;base64,)([^"]{0,80})', text)
    assert outside == []
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    on_disk = {path.read_bytes() for path in (report.parent / "plots").glob("*-test.png")}
    assert {base64.b64decode(picture) for picture in pictures} == on_disk
    scores = json.loads((report.parent / "evaluation-test.json").read_text())
    for name, leads in scores["scores"].items():
        for lead, s in leads.items():
            row = next(line for line in text.splitlines() if f"<td>{name} {lead}</td><td>{s['rmse']:.2f}</td>" in line)
            assert f">{s['skill']:+.2f}<" in row
            assert not re.search(r'class="(better|worse)"', row)  # four days: no interval is known
    for fingerprint in scores["fingerprints"].values():
        assert fingerprint in text


def test_only_an_interval_without_0_is_coloured(report: Path) -> None:
    scores = json.loads((report.parent / "evaluation-test.json").read_text())
    for lead, low, high in (("6h", 0.1, 0.3), ("12h", -0.1, 0.3)):
        for baseline in ("skill", "climatology_skill", "mix_skill"):
            scores["scores"]["co"][lead] |= {f"{baseline}_low": low, f"{baseline}_high": high}
    scores["scores"]["co"]["12h"] |= {"mix_skill_low": -0.3, "mix_skill_high": -0.1}
    lines = page("run", scores, "", [], {}).splitlines()
    first, second = (next(line for line in lines if f"<td>co {lead}</td>" in line) for lead in ("6h", "12h"))
    assert first.count('class="better"') == 3
    assert 'class="worse"' not in first
    assert second.count('class="worse"') == 1
    assert 'class="better"' not in second


def test_a_report_of_scores_of_another_step_is_refused(report: Path) -> None:
    path = report.parent / "evaluation-test.json"
    kept = path.read_text()
    path.write_text(json.dumps(json.loads(kept) | {"step": 1}))
    try:
        done = module("trainer", "report", str(report.parent))
        assert done.returncode == 2
        assert "differs in step, weights or data: evaluate again" in done.stderr
        done = module("trainer", "report", str(report.parent), "--split", "validation")
        assert "evaluate" in done.stderr
        assert "--split validation` first" in done.stderr
    finally:
        path.write_text(kept)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("width", [500, 1280])  # a headless window is never narrower than 500 pixels
def test_a_browser_shows_it_without_scrolling_sideways(report: Path, width: int, tmp_path: Path) -> None:
    """Wide tables scroll by themselves; what the page says of itself is put into its title for the test alone."""
    own = """<script>document.title = JSON.stringify({wide: document.documentElement.scrollWidth, shown: window.innerWidth,
        broken: [...document.images].filter(i => !i.naturalWidth).length, images: document.images.length})</script></body>"""
    page = tmp_path / "page.html"
    page.write_text(report.read_text().replace("</body>", own))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},800", "--dump-dom"]
    told = run([*command, f"--user-data-dir={tmp_path}/profile", page.as_uri()], timeout=120).stdout
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", told)[1]))  # type: ignore[index]
    assert seen["broken"] == 0
    assert seen["images"] >= 10
    assert seen["wide"] <= seen["shown"]


def own_series(trained: Path, out: Path) -> xr.Dataset:
    days = ("--from", "2015-01-13", "--to", "2015-01-16", "--every", "6")
    done = module("trainer", "forecast", str(trained), *days, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return xr.open_zarr(out, consolidated=False, decode_timedelta=True)


def test_against_its_own_forecasts_it_is_neither_better_nor_worse(
    trained: Path, forecaster: Forecaster, tmp_path: Path
) -> None:
    own_series(trained, tmp_path / "own.zarr").close()
    done = module("trainer", "evaluate", str(trained), "--against", str(tmp_path / "own.zarr"))
    assert done.returncode == 0, done.stderr
    result = json.loads((trained / "evaluation-test.json").read_text())
    assert "own.zarr" in result["against"]
    for leads in result["scores"].values():
        for s in leads.values():
            assert s["against_skill"] == pytest.approx(0.0, abs=1e-4)
            assert s["against_rmse"] != s["rmse"]  # a sixth of the analyses only


def test_forecasts_of_another_shape_are_compared_at_their_valid_times(
    trained: Path, forecaster: Forecaster, tiny_path: Path, tmp_path: Path
) -> None:
    """Of valid times alone, on a finer grid south first, in mg m-3, a mixing ratio and one field under another name: the
    analysis itself, so the error that is left is that of the interpolation."""
    store = forecaster.dataset.store
    first, last = store.splits["test"][0]
    hours = np.arange(first, last)
    weather, chemistry = (ShardReader(store, group).read(hours).astype("f8") for group in ("weather", "chemistry"))
    fields = {name: chemistry[:, store.contents.channel(name)] for name in store.contents.names("chemistry")}
    psfc, temp = (weather[:, store.contents.channel(name)] for name in ("psfc", "temp"))
    ratio = fields["o3"] * 287.05 * temp / psfc / 1e9
    dims = ("valid_time", "latitude", "longitude")
    written = xr.Dataset(
        {
            "pm2p5": (dims, fields["pm25"] / 1000.0, {"units": "mg m-3"}),
            "go3": (dims, ratio, {"units": "kg kg-1"}),
            "sp": (dims, psfc / 100.0, {"units": "hPa"}),
            "t2m": (dims, temp - 273.15, {"units": "degC"}),
            **{name: (dims, fields[name], {"units": "ug m-3"}) for name in ("pm10", "so2", "no2", "co")},
        },
        {"valid_time": store.times[hours].astype("datetime64[ns]"), "latitude": store.lat, "longitude": store.lon},
    )
    finer = np.linspace(store.lat.min(), store.lat.max(), 2 * len(store.lat) - 1)
    written.isel(latitude=slice(None, None, -1)).interp(latitude=finer).to_netcdf(tmp_path / "cams.nc")
    done = evaluate(forecaster, Options(against=tmp_path / "cams.nc"))
    assert done is not None
    for name, leads in done.scores["scores"].items():
        for s in leads.values():
            assert s["against_rmse"] < 1e-3 * s["mean_truth"], name
            assert s["against_skill"] < -100


def test_what_cannot_be_compared_is_refused(trained: Path, forecaster: Forecaster, tmp_path: Path) -> None:
    own = own_series(trained, tmp_path / "own.zarr").load()
    for changed, said in (
        (own.drop_vars("o3"), "has no o3; it has"),
        (own.assign(o3=own["o3"].assign_attrs(units="kg kg-1")), "is a mixing ratio"),
        (own.assign_coords(time=own["time"] + np.timedelta64(365, "D")), "has none of the forecasts from"),
        (xr.concat([own, own.isel(time=[1])], "time"), "has the same forecast twice"),
        (own.drop_vars("o3").assign(o3=own["o3"].isel(lat=slice(1, None)).rename(lat="y")), "is on another grid than"),
        (own.rename(lat="row").drop_vars("row"), "no coordinate of .* is its latitude"),
    ):
        path = tmp_path / f"{len(said)}.nc"
        changed.to_netcdf(path)
        with pytest.raises(DataError, match=said):
            evaluate(forecaster, Options(against=path))
    (tmp_path / "no.nc").write_text("no")
    with pytest.raises(DataError, match="cannot be read"):
        evaluate(forecaster, Options(against=tmp_path / "no.nc"))
