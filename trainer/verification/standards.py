"""Limits and air-quality indices of the standards in standards.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from data.strict import parse_yaml

FILE = Path(__file__).with_name("standards.yaml")
CLASSES = ("excellent", "good", "lightly polluted", "moderately polluted", "heavily polluted", "severely polluted")
CLASS_ENDS = (50.0, 100.0, 150.0, 200.0, 300.0)  # the last index of each class but the last (HJ 633)
EIGHT_HOURS = "8 h"


@dataclass(frozen=True)
class Limit:
    """A concentration that should not be exceeded."""

    standard: str
    averaging: str  # "24 h", "8 h" or "1 h"
    pollutant: str
    value: float  # ug m-3


@dataclass(frozen=True)
class Index:
    """An air-quality index of daily values."""

    standard: str
    points: tuple[float, ...]  # individual index at each break point
    breaks: dict[str, tuple[float, ...]]  # pollutant -> concentrations, ug m-3; ozone's end before the last points

    def individual(self, pollutant: str, value: Tensor) -> Tensor:
        """Individual index of daily values, rounded up; beyond the last break point it stays there.

        Args:
            value: ug m-3, daily mean, of ozone the largest mean of eight hours; NaN where there is none.
        """
        breaks = torch.tensor(self.breaks[pollutant], dtype=torch.float64, device=value.device)
        points = torch.tensor(self.points[: len(breaks)], dtype=torch.float64, device=value.device)
        value = value.double().clamp(min=breaks[0], max=breaks[-1])
        above = torch.bucketize(value.nan_to_num(0.0), breaks[1:-1])
        share = (value - breaks[above]) / (breaks[above + 1] - breaks[above])
        exact = points[above] + share * (points[above + 1] - points[above])
        return (exact - 1e-9).ceil().clamp(min=0.0)  # a value on a break point, in floating point, is not above it


def class_of(index: Tensor) -> Tensor:
    """0 .. 5, places in CLASSES."""
    return torch.bucketize(index.nan_to_num(0.0), torch.tensor(CLASS_ENDS, dtype=torch.float64, device=index.device))


@lru_cache(maxsize=1)
def standards() -> tuple[tuple[Limit, ...], tuple[Index, ...]]:
    """All limits and indices."""
    tree = parse_yaml(FILE.read_text(encoding="utf-8"), str(FILE))
    limits = tuple(
        Limit(entry["standard"], averaging, pollutant, float(value))
        for entry in tree["limits"]
        for averaging, values in entry.items()
        if averaging != "standard"
        for pollutant, value in values.items()
    )
    indices = tuple(
        Index(entry["standard"], tuple(map(float, entry["points"])), {**entry["24 h"], **entry[EIGHT_HOURS]})
        for entry in tree["indices"]
    )
    return limits, indices
