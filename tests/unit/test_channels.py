"""What the network is given beside the analysis: the sun against published positions, other hours against the store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data import DataError
from data.batch import Normalizer
from data.channels.channels import Channels, Read
from data.channels.sun import cosine_of_zenith, season
from data.samples import index_samples
from data.store.layout import Store
from data.store.reader import ShardReader
from data.stream import Stream
from data.variables import MODEL_INPUTS, PUBLISHED
from tests.distributed.test_elastic import require_equal_state
from tests.launching import losses, manifest, tiny_config, train
from trainer.baselines.blend import best_weights
from trainer.checkpoint.manifest import CheckpointError
from trainer.config import InitFrom
from trainer.config_file import load
from trainer.dataset import open_dataset
from trainer.model.topoflow import TopoFlow
from trainer.preflight.plan_command import training_samples
from trainer.weights.fit import network_of
from trainer.weights.reading import read

CPU = torch.device("cpu")
# Published positions: (UTC, latitude, longitude, zenith angle without refraction).
# The first from Reda and Andreas (2004), Solar Position Algorithm, NREL/TP-560-34302, table A5.1 (elevation 39.872046);
# the others from the definitions of solstice and equinox, and the equation of time of the Astronomical Almanac.
POSITIONS = [
    ("2003-10-17T19:30:30", 39.742476, -105.1786, 50.127954),
    ("2024-06-20T20:51:00", 23.436, -132.2, 0.02),  # June solstice; the equation of time is -1.8 min
    ("2024-11-03T11:43:34", -15.21, 0.0, 0.08),  # the sun is earliest, by 16 min 27 s
]


@pytest.mark.parametrize(("when", "lat", "lon", "zenith"), POSITIONS)
def test_the_sun_stands_where_it_was_published(when: str, lat: float, lon: float, zenith: float) -> None:
    hours = torch.tensor([np.datetime64(when, "s").astype(int) / 3600.0], dtype=torch.float64)
    place = (torch.tensor([x], dtype=torch.float64) for x in (lat, lon))
    found = float(torch.rad2deg(torch.acos(cosine_of_zenith(hours, *place).clamp(max=1.0)))[0, 0, 0])
    assert found == pytest.approx(zenith, abs=0.1)


def test_the_sun_is_0_at_night_and_highest_at_noon_by_the_sun() -> None:
    hours = torch.arange(24, dtype=torch.float64) + np.datetime64("2015-03-20T00", "h").astype(int)
    lat, lon = torch.tensor([0.0, 45.0], dtype=torch.float64), torch.tensor([0.0, 90.0, 120.0], dtype=torch.float64)
    sun = cosine_of_zenith(hours, lat, lon)
    assert sun.shape == (24, 2, 3)
    assert sun.min() == 0.0
    assert sun.argmax(0).tolist() == [[12, 6, 4], [12, 6, 4]]
    assert sun[:, 0, 0].max() == pytest.approx(1.0, abs=2e-3)
    assert sun[:, 1, 0].max() == pytest.approx(np.cos(np.deg2rad(45)), abs=5e-3)


def test_the_season_turns_once_a_year() -> None:
    sine, cosine = season(torch.tensor([0.0, 365.2425 * 6.0, 365.2425 * 24.0], dtype=torch.float64))
    torch.testing.assert_close(sine, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(cosine, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), atol=1e-9, rtol=0)


def test_channels_are_named_and_every_group_is_read_once() -> None:
    given = Channels(["u", "pm25", "elevation"], history=[6, 12], future=["u", "temp"], derived=["sun", "day"])
    later = ["u@+lead", "temp@+lead", "sun", "sun@+lead", "day_sin", "day_cos"]
    assert given.names == ["u", "pm25", "elevation", "u@-6h", "pm25@-6h", "u@-12h", "pm25@-12h", *later]
    assert [read.key for read in given.reads(PUBLISHED)] == [
        "weather", "chemistry", "weather@-6h", "chemistry@-6h", "weather@-12h", "chemistry@-12h", "weather@+lead"
    ]  # fmt: skip
    assert Channels(MODEL_INPUTS).names == list(MODEL_INPUTS)
    assert Channels(MODEL_INPUTS).reads(PUBLISHED) == (Read("weather"), Read("chemistry"))
    assert Channels(["u", "v"]).reads(PUBLISHED) == (Read("weather"), Read("chemistry"))


def test_what_is_given_of_other_hours_is_what_the_store_holds(tiny: Store) -> None:
    channels = Channels(["u", "pm25", "elevation"], history=[5], future=["temp"], derived=["sun"])
    normalizer = Normalizer(tiny, channels, ["pm25"], CPU)
    index = index_samples(tiny, "train", [7], None, "none", 0, normalizer.reads)
    raw = next(Stream(tiny, index, None, "none", 0, 128, False, normalizer.reads).listed(np.array([0, 9, 40]), 3))
    inputs = normalizer(raw).inputs
    assert inputs.shape[1] == len(channels.names) == 8
    weather, chemistry = (ShardReader(tiny, group).read(np.arange(len(tiny.times))) for group in ("weather", "chemistry"))
    for row, t in enumerate(raw.hours):
        fields = {
            "u@-5h": weather[t - 5, 0],
            "pm25@-5h": chemistry[t - 5, 0],
            "temp@+lead": weather[t + 7, 2],
            "u": weather[t, 0],
        }
        for name, field in fields.items():
            own = tiny.statistics[name.split("@")[0]]
            expected = np.nan_to_num((field - own["mean"]) / own["std"])
            np.testing.assert_allclose(inputs[row, channels.names.index(name)], expected, atol=2e-4)
        when = torch.tensor([tiny.times[t + 7].astype("datetime64[h]").astype(int)], dtype=torch.float64)
        sun = cosine_of_zenith(when, torch.from_numpy(tiny.lat), torch.from_numpy(tiny.lon))[0]
        torch.testing.assert_close(inputs[row, channels.names.index("sun@+lead")], sun.float())


def test_logarithms_are_normalised_by_their_own_statistics_and_come_back(tiny: Store) -> None:
    """Given, predicted and turned back into ug m-3; other variables are not touched."""
    plain, logarithmic = (
        Normalizer(tiny, Channels(["u", "pm25", "o3"], logarithmic=names), ["pm25", "o3"], CPU) for names in ((), ("pm25",))
    )
    raw = next(
        Stream(tiny, index_samples(tiny, "train", [7], None, "none", 0), None, "none", 0, 128, False).listed(np.arange(3), 3)
    )
    one, other = plain(raw), logarithmic(raw)
    own = tiny.statistics["pm25"]
    expected = np.nan_to_num((np.log1p(raw.fields["chemistry"][:, 0].double().numpy()) - own["log_mean"]) / own["log_std"])
    np.testing.assert_allclose(other.inputs[:, 1].numpy(), expected, atol=1e-4)
    for channel in (0, 2):
        assert torch.equal(one.inputs[:, channel], other.inputs[:, channel])
    truth = logarithmic.truth(raw)
    known = torch.isfinite(truth)
    torch.testing.assert_close(logarithmic.physical(other.targets)[known], truth[known], rtol=1e-4, atol=1e-3)
    assert torch.equal(one.targets[:, 1], other.targets[:, 1])
    assert float(logarithmic.physical(torch.full((1, 2, 16, 32), -99.0)).min()) == 0.0
    assert torch.equal(logarithmic.target_std, plain.target_std)


def test_logarithms_that_a_store_did_not_measure_are_refused(tiny: Store) -> None:
    with pytest.raises(DataError, match="no statistics of logarithms of temp"):
        Normalizer(tiny, Channels(["temp", "pm25"], logarithmic=["temp"]), ["pm25"], CPU)


def test_samples_need_every_hour_that_they_read(tiny: Store) -> None:
    missing = {group: np.zeros_like(share) for group, share in tiny.missing.items()}
    missing["weather"][50] = 1.0
    store = replace(tiny, missing=missing)
    reads = Channels(["u", "pm25"], history=[6], future=["u"]).reads(tiny.contents)
    index = index_samples(store, "train", [12], None, "none", 0, reads)
    assert index.t.min() == 6  # there is nothing before the first hour
    assert not {50, 56, 38} & set(index.t.tolist())
    assert {51, 55, 37} <= set(index.t.tolist())


def test_the_plan_counts_the_samples_that_the_run_will_have(tiny: Store, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tiny.path, wind_scan={"mode": "none"})
    counts = []
    for history in ("[]", "[30]"):
        run = load(config, [f"data.history={history}"])
        counts.append(training_samples(run))
        assert counts[-1] == len(open_dataset(run, CPU).index("train"))
    assert counts[0] != counts[1]


def test_the_best_share_of_an_anomaly_is_the_one_of_least_squares(tiny: Store, tmp_path: Path) -> None:
    """Against numpy's regression through the origin of anomalies from what is usual, over the same samples."""
    config = tiny_config(tmp_path, tiny.path, wind_scan={"mode": "none"})
    dataset = open_dataset(load(config, ["model.predict=change", "data.targets=[pm25, o3]"]), CPU)
    index = dataset.index("train")
    assert dataset.usual is not None
    found = best_weights(dataset, dataset.usual, 16)
    numbers = index.evenly(16)
    chemistry = ShardReader(tiny, "chemistry").read(np.arange(len(tiny.times))).astype("f8")
    training = chemistry[tiny.inside("train")]
    usual = np.stack([np.nanmean(training[hour::24], axis=0) for hour in range(24)])
    for row, channel in enumerate((0, 5)):
        anomaly = chemistry[:, channel] - usual[np.arange(len(chemistry)) % 24, channel]
        for column, lead in enumerate((6, 12)):
            t = index.t[numbers][index.lead[numbers] == lead]
            before, after = np.nan_to_num(anomaly[t]), anomaly[t + lead]
            weight = dataset.normalizer.area.numpy() * np.isfinite(after)
            expected = (weight * before * np.nan_to_num(after)).sum() / (weight * before**2).sum()
            assert float(found[row, column]) == pytest.approx(expected, rel=1e-3)


def test_a_network_of_changes_starts_from_what_is_usual_and_the_anomaly_that_is_left(tiny: Store, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tiny.path, wind_scan={"mode": "none"})
    run = load(config, ["model.predict=change", "model.dropout=0", "model.drop_path=0"])
    network = TopoFlow(run.architecture()).eval()
    given = (torch.randn(2, 15, 16, 32), torch.tensor([12.0, 6.0]), torch.zeros(128), torch.arange(128).expand(2, -1))
    departure = torch.randn(2, 2, 6, 16, 32)
    with torch.no_grad():
        plain = network(*given, torch.zeros_like(departure))
        network.analysis_weight.copy_(torch.arange(12.0).view(6, 2))
        share = torch.stack([network.analysis_weight[:, 1], network.analysis_weight[:, 0]])[:, :, None, None]
        torch.testing.assert_close(network(*given, departure), plain + departure[:, 1] + share * departure[:, 0])
        for wrong in (None, departure[:, :1]):
            with pytest.raises(ValueError, match="departure must have shape"):
                network(*given, wrong)


@pytest.mark.slow
def test_everything_on_resumes_bit_for_bit_and_on_other_ranks(tiny: Store, tiny_scan: object, tmp_path: Path) -> None:
    """History, future weather, sun and season, changes, another loss, frozen layers: 6 steps at once; 3 and 3; and the
    last 3 by one rank at another stage."""
    given = ["data.history=[6]", "data.future=[u, v]", "data.derived=[sun, day]", "data.transform={co: log1p}", "ema=0.9"]
    learnt = ["model.predict=change", "loss.kind=huber", "loss.weights={pm25: 2.0}", "freeze=[head.0.*]"]
    everything = [*given, *learnt, "checkpoint.every=3", "validation.every=100"]
    jobs = {"whole": [(6, 2, "1")], "parts": [(3, 2, "1"), (6, 2, "1")], "elastic": [(3, 2, "1"), (6, 1, "3")]}
    for name, starts in jobs.items():
        (tmp_path / name).mkdir()
        config = tiny_config(tmp_path / name, tiny.path)
        for last, ranks, zero in starts:
            done = train(config, *everything, f"steps={last}", ranks=ranks, zero=zero)
            assert done.returncode == 0, done.stderr
    whole, parts, elastic = (tmp_path / name / "run" for name in jobs)
    assert losses(whole) == losses(parts)
    hashes = [manifest(run / "checkpoints" / "step-00000006")["tensors"] for run in (whole, parts)]
    assert hashes[0] == hashes[1]
    assert "analysis_weight" in str(sorted(hashes[0]))
    assert (whole / "analysis_weight.json").exists()
    require_equal_state(elastic, whole, 6, exact=False)
    start, end = (load_file(whole / f"checkpoints/step-{step:08d}/weights.safetensors") for step in (3, 6))
    assert {name for name in start if torch.equal(start[name], end[name])} == {
        "head.0.weight",
        "head.0.bias",
        "blocks.0.attn.H_scale",  # never trained
    }


def test_weights_of_other_channels_are_found_by_their_names(tiny: Store, tmp_path: Path) -> None:
    """Published weights in a network whose variables are listed in another order: the same forecast, in another order; and
    with more channels: what belongs to the old ones is theirs, the new ones are as the network made them."""
    config = tiny_config(tmp_path, tiny.path, wind_scan={"mode": "none"})
    still = ["model.dropout=0", "model.drop_path=0"]
    torch.manual_seed(1)
    old = TopoFlow(load(config, still).architecture()).eval()
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    file = tmp_path / "published.safetensors"
    save_file(old.state_dict(), file)
    turned = [*MODEL_INPUTS[::-1]]
    run = load(config, [*still, f"data.inputs={turned}".replace("'", "")])
    with pytest.raises(CheckpointError, match="does not say in which order its 15 channels are"):
        network_of(read(file), run)
    published = InitFrom(path=file, channels="published")
    network, report = network_of(read(file), run, published)
    assert report.share == 1.0
    x = torch.randn(2, 15, 16, 32)
    rest = torch.tensor([6.0, 12.0]), torch.rand(128) * 1000, torch.arange(128).expand(2, -1)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x.flip(1), *rest), old(x, *rest), rtol=1e-4, atol=1e-5)
    more = load(config, [*still, "data.derived=[sun]", "data.inputs=[u, v, pm25, o3, elevation]", "data.targets=[pm25, o3]"])
    network, report = network_of(read(file), more, published)
    assert report.fresh == ["sun", "sun@+lead"]
    assert "temp" in report.left_out
    torch.manual_seed(more.seed)
    own = TopoFlow(more.architecture()).state_dict()
    ours = network.state_dict()
    for here, name in enumerate(more.data.channels().names):
        there = MODEL_INPUTS.index(name) if name in MODEL_INPUTS else None
        truth, place = (own, here) if there is None else (old.state_dict(), there)
        assert torch.equal(ours["var_embed"][:, here], truth["var_embed"][:, place])
        assert torch.equal(ours["token_embeds.proj_weights"][here], truth["token_embeds.proj_weights"][place])
        for leaf in ("weight", "bias"):
            rows, wanted = (t[f"head.4.{leaf}"].unflatten(0, (4, -1)) for t in (ours, truth))
            assert torch.equal(rows[:, here], wanted[:, place])


def test_future_weather_that_no_store_has_is_refused(tiny: Store) -> None:
    with pytest.raises(DataError, match="unknown variable 'pblh'"):
        Normalizer(tiny, Channels(["u", "pm25"], future=["pblh"]), ["pm25"], CPU)
