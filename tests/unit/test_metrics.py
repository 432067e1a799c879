"""Accumulated errors against numpy on everything at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from trainer.scores.errors import ErrorSums, weighted_loss


def weighted_correlation(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> float:
    covariance = np.cov(a, b, aweights=weights, bias=True)
    return float(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))


def test_scores_equal_those_of_all_samples_at_once_whatever_the_batches() -> None:
    rng = np.random.default_rng(0)
    leads = np.array([12, 24, 24, 12, 24])
    forecast, truth, before, usual = np.abs(rng.normal(10, 6, (4, 5, 2, 4, 6))) + 0.1
    truth[rng.random(truth.shape) < 0.2] = np.nan
    before[rng.random(before.shape) < 0.2] = np.nan
    usual[rng.random(usual.shape) < 0.1] = np.nan
    areas = rng.random((2, 4, 6))
    baselines = ("persistence", "climatology")
    sums = ErrorSums(2, [12, 24], torch.device("cpu"), baselines, regions=2)
    mean = np.array([9.0, 11.0])
    for part in (slice(0, 2), slice(2, 5)):
        own, seen, *others = (torch.from_numpy(a[part]) for a in (forecast, truth, before, usual))
        given = dict(zip(baselines, others, strict=True))
        reference = torch.from_numpy(mean)[:, None, None]
        sums.add(own, seen, given, torch.from_numpy(areas), torch.from_numpy(leads[part]), None, reference)
    for region, area in enumerate(areas):
        require_scores(sums.table(region), area, leads, mean, forecast, truth, before, usual)


def require_scores(
    table: dict[str, torch.Tensor], area: np.ndarray, leads: np.ndarray, mean: np.ndarray, *fields: np.ndarray
) -> None:
    """What numpy makes of all cells at once."""
    forecast, truth, before, usual = fields
    for variable in range(2):
        for column, lead in enumerate((12, 24)):
            f, t, p, u = (a[leads == lead, variable] for a in (forecast, truth, before, usual))
            w, m = np.broadcast_to(area, t.shape), mean[variable]
            k, c, d = np.isfinite(t), np.isfinite(t) & np.isfinite(p), np.isfinite(t) & np.isfinite(u)
            rmse = np.sqrt(np.average((f - t)[k] ** 2, weights=w[k]))
            persistence = np.sqrt(np.average((p - t)[c] ** 2, weights=w[c]))
            climatology = np.sqrt(np.average((u - t)[d] ** 2, weights=w[d]))
            expected = {
                "climatology_rmse": climatology,
                "climatology_skill": 1 - np.average((f - t)[d] ** 2, weights=w[d]) / climatology**2,
                "rmse": rmse,
                "mae": np.average(abs(f - t)[k], weights=w[k]),
                "bias": np.average((f - t)[k], weights=w[k]),
                "persistence_rmse": persistence,
                "skill": 1 - np.average((f - t)[c] ** 2, weights=w[c]) / persistence**2,
                "nmb": (w * (f - t))[k].sum() / (w * t)[k].sum(),
                "nme": (w * abs(f - t))[k].sum() / (w * t)[k].sum(),
                "mfb": np.average((2 * (f - t) / (f + t))[k], weights=w[k]),
                "mfe": np.average((2 * abs(f - t) / (f + t))[k], weights=w[k]),
                "fac2": np.average(((f / t >= 0.5) & (f / t <= 2.0))[k], weights=w[k]),
                "r": weighted_correlation(f[k], t[k], w[k]),
                "ioa": 1 - (w * (f - t) ** 2)[k].sum() / (w * (abs(f - m) + abs(t - m)) ** 2)[k].sum(),
                "acc": (w * (f - u) * (t - u))[d].sum() / np.sqrt((w * (f - u) ** 2)[d].sum() * (w * (t - u) ** 2)[d].sum()),
            }
            for name, value in expected.items():
                assert float(table[name][variable, column]) == pytest.approx(value, rel=1e-12), name


def test_the_interval_of_the_skill_is_that_of_whole_days_drawn_again() -> None:
    """Against a loop over resamples of whole days, with the days themselves; and batches in another order."""
    rng = np.random.default_rng(1)
    samples = 40
    day, lead = rng.integers(3, 12, samples), rng.choice([12, 24], samples)
    forecast, truth, before = rng.normal(10, 3, (3, samples, 1, 3, 4))
    forecast += 0.6 * (truth - forecast) * (day[:, None, None, None] % 3 > 0)
    given = [torch.from_numpy(a) for a in (forecast, truth, before)]
    whole, parts = (ErrorSums(1, [12, 24], torch.device("cpu"), blocks=20) for _ in range(2))
    area = torch.ones(3, 4)
    own, seen, unchanged = given
    whole.add(own, seen, {"persistence": unchanged}, area, torch.from_numpy(lead), torch.from_numpy(day))
    for part in (slice(20, 40), slice(0, 20)):
        baselines = {"persistence": unchanged[part]}
        parts.add(own[part], seen[part], baselines, area, torch.from_numpy(lead[part]), torch.from_numpy(day[part]))
    torch.testing.assert_close(whole.intervals(), parts.intervals())
    low, high = (whole.intervals(resamples=4000)[f"skill_{end}"].numpy() for end in ("low", "high"))
    days, own = np.unique(day), np.random.default_rng(2)
    for column, hours in enumerate((12, 24)):
        squares = [[((a - truth)[(day == d) & (lead == hours)] ** 2).sum() for d in days] for a in (forecast, before)]
        drawn = own.integers(0, len(days), (4000, len(days)))
        skill = 1 - np.array(squares[0])[drawn].sum(1) / np.array(squares[1])[drawn].sum(1)
        assert float(low[0, column]) == pytest.approx(np.quantile(skill, 0.025), abs=0.02)
        assert float(high[0, column]) == pytest.approx(np.quantile(skill, 0.975), abs=0.02)
        assert low[0, column] < float(whole.table()["skill"][0, column]) < high[0, column]


@pytest.mark.parametrize("kind", ["squared", "absolute", "huber"])
def test_kinds_of_loss_are_those_of_torch(kind: str) -> None:
    torch.manual_seed(0)
    forecast, target = 2.0 * torch.randn(2, 3, 2, 4, 5)
    weight = torch.rand(3, 2, 4, 5)
    own = {"squared": functional.mse_loss, "absolute": functional.l1_loss, "huber": functional.huber_loss}[kind]
    each = own(forecast, target, reduction="none") * (2.0 if kind == "huber" else 1.0)  # torch halves the square there
    torch.testing.assert_close(weighted_loss(forecast, target, weight, kind), (weight * each).mean((0, 2, 3)))


def test_loss_of_a_batch_is_the_mean_of_its_parts_and_ignores_missing_targets() -> None:
    torch.manual_seed(0)
    forecast, target = torch.randn(2, 4, 3, 5, 6)
    weight = torch.rand(4, 3, 5, 6)
    weight[1, 2] = 0.0
    whole = weighted_loss(forecast, target, weight)
    parts = torch.stack([weighted_loss(forecast[i : i + 2], target[i : i + 2], weight[i : i + 2]) for i in (0, 2)])
    torch.testing.assert_close(whole, parts.mean(0))
    target[1, 2] = 1e6
    torch.testing.assert_close(weighted_loss(forecast, target, weight), whole)


def test_a_few_days_have_no_interval_and_are_no_reason_to_fail() -> None:
    """One lead time on two days of forty: its interval is not known, that of the other one is."""
    rng = np.random.default_rng(5)
    day = np.repeat(np.arange(40), 2)
    lead = np.where((np.arange(80) % 2 == 1) & (day < 2), 24, 12)
    forecast, truth, before = (torch.from_numpy(a) for a in rng.normal(10, 3, (3, 80, 1, 2, 2)))
    sums = ErrorSums(1, [12, 24], torch.device("cpu"), blocks=40)
    sums.add(forecast, truth, {"persistence": before}, torch.ones(2, 2), torch.from_numpy(lead), torch.from_numpy(day))
    bounds = sums.intervals()
    for end in ("skill_low", "skill_high"):
        assert torch.isfinite(bounds[end][0, 0])
        assert torch.isnan(bounds[end][0, 1])


def test_a_forecast_that_is_not_finite_shows_in_the_scores() -> None:
    sums = ErrorSums(1, [12], torch.device("cpu"))
    forecast, truth = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    forecast[0, 0, 1, 1] = torch.nan
    sums.add(forecast, truth, {"persistence": truth}, torch.ones(2, 2), torch.tensor([12]))
    assert torch.isnan(sums.table()["rmse"]).all()
