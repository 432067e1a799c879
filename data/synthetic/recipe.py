"""What determines a synthetic store."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a synthetic store; two equal recipes give equal fingerprints."""

    days: int = 60
    rows: int = 64
    cols: int = 128
    start: str = "2015-01-01"
    seed: int = 0
    blocking: float = 2.0  # per km of climb; 0 lets everything pass
    missing: float = 0.003  # share of pollutant cells hidden, as station outages are
    train: float = 0.7  # share of the hours, from the start
    validation: float = 0.15  # the rest is test
    shard_hours: int = 120
