"""Accumulated errors against numpy on everything at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.scores.errors import ErrorSums, weighted_mse


def test_scores_equal_those_of_all_samples_at_once_whatever_the_batches() -> None:
    rng = np.random.default_rng(0)
    leads = np.array([12, 24, 24, 12, 24])
    forecast, truth, before = rng.normal(10, 3, (3, 5, 2, 4, 6))
    truth[rng.random(truth.shape) < 0.2] = np.nan
    before[rng.random(before.shape) < 0.2] = np.nan
    area = rng.random((4, 6))
    sums = ErrorSums(2, [12, 24], torch.device("cpu"))
    for part in (slice(0, 2), slice(2, 5)):
        arrays = (torch.from_numpy(a[part]) for a in (forecast, truth, before))
        sums.add(*arrays, torch.from_numpy(area), torch.from_numpy(leads[part]))
    table = sums.table()
    for variable in range(2):
        for column, lead in enumerate((12, 24)):
            f, t, p = (a[leads == lead, variable] for a in (forecast, truth, before))
            w = np.broadcast_to(area, t.shape)
            k, c = np.isfinite(t), np.isfinite(t) & np.isfinite(p)
            rmse = np.sqrt(np.average((f - t)[k] ** 2, weights=w[k]))
            persistence = np.sqrt(np.average((p - t)[c] ** 2, weights=w[c]))
            expected = {
                "rmse": rmse,
                "mae": np.average(abs(f - t)[k], weights=w[k]),
                "bias": np.average((f - t)[k], weights=w[k]),
                "persistence_rmse": persistence,
                "skill": 1 - np.average((f - t)[c] ** 2, weights=w[c]) / persistence**2,
            }
            for name, value in expected.items():
                assert float(table[name][variable, column]) == pytest.approx(value, rel=1e-12), name


def test_loss_of_a_batch_is_the_mean_of_its_parts_and_ignores_missing_targets() -> None:
    torch.manual_seed(0)
    forecast, target = torch.randn(2, 4, 3, 5, 6)
    weight = torch.rand(4, 3, 5, 6)
    weight[1, 2] = 0.0
    whole = weighted_mse(forecast, target, weight)
    parts = torch.stack([weighted_mse(forecast[i : i + 2], target[i : i + 2], weight[i : i + 2]) for i in (0, 2)])
    torch.testing.assert_close(whole, parts.mean(0))
    target[1, 2] = 1e6
    torch.testing.assert_close(weighted_mse(forecast, target, weight), whole)
