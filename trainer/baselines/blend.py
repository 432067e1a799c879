"""Where a network that predicts the change starts: the best mix of persistence and climatology, fitted once.

Anomalies decay: the forecast with the least squared error that knows only the anomaly of the analysis is a share of it, the
covariance of analysis and truth over the variance of the analysis, a number for each target and lead time.
"""

from __future__ import annotations

import json
import logging

import torch

from data.channels.climatology import Climatology
from trainer.dataset import Dataset
from trainer.model.topoflow import TopoFlow

log = logging.getLogger("trainer")
SAMPLES = 512


def fit(network: TopoFlow, dataset: Dataset) -> None:
    """Set the weights of the analysis to the best ones on samples spread evenly over the training split, and keep them."""
    assert network.analysis_weight is not None
    assert dataset.usual is not None
    weights = best_weights(dataset, dataset.usual, SAMPLES).cpu()
    with torch.no_grad():
        network.analysis_weight.copy_(weights)
    targets, leads = dataset.normalizer.targets, dataset.run.data.lead_hours
    table = {name: dict(zip(map(str, leads), row, strict=True)) for name, row in zip(targets, weights.tolist(), strict=True)}
    (dataset.run.run_dir / "analysis_weight.json").write_text(json.dumps(table, indent=1))
    shown = "; ".join(f"{name} " + " ".join(f"{share:.2f}" for share in leads.values()) for name, leads in table.items())
    log.info("starts from the analysis' anomaly times (%s h): %s", ", ".join(map(str, leads)), shown)


def best_weights(dataset: Dataset, usual: Climatology, samples: int) -> torch.Tensor:
    """(T, L) fp32: covariance over variance, over the valid cells of the domain."""
    index, targets = dataset.index("train"), dataset.normalizer.targets
    leads = torch.tensor(dataset.run.data.lead_hours, device=dataset.device)
    products = torch.zeros((2, len(targets), len(leads)), dtype=torch.float64, device=dataset.device)
    for raw in dataset.stream(index).listed(index.evenly(samples), dataset.run.batch.micro):
        batch, example, _ = dataset.prepare(raw)
        departure = dataset.normalizer.departure(batch, usual.at(batch.hours), usual.at(batch.valid_hours))
        before, then = departure.double().unbind(1)
        known = example.weight * batch.counted[:, None, None, None]
        of_sample = torch.stack([known * before * (example.targets - then), known * before**2]).sum((-2, -1))  # (2, B, T)
        for column, lead in enumerate(leads):
            products[:, :, column] += of_sample[:, batch.lead_hours == lead].sum(1)
    return (products[0] / products[1].clamp(min=1e-12)).float()
