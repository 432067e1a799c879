"""Mergeable statistics of a variable: moments, extremes, quantiles from fixed bins, logarithms, tendencies.

Everything is measured a shard at a time and merged, so that shards may be written by any process in any order and the
result is the same to the bit. Pollutants are also measured as log(1 + x), x in ug m-3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data import DataError
from data.variables import Variable

BINS = 4096
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass
class Moments:
    """Count, mean and sum of squared deviations, merged pairwise (Chan, Golub and LeVeque 1983)."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def merge(self, other: Moments) -> None:
        if other.count:
            delta, total = other.mean - self.mean, self.count + other.count
            self.mean += delta * other.count / total
            self.m2 += other.m2 + delta**2 * self.count * other.count / total
            self.count = total

    def std(self) -> float:
        return float(np.sqrt(self.m2 / self.count)) if self.count else 0.0


def moments(values: np.ndarray) -> Moments:
    """Of (n,) values, in float64."""
    if not values.size:
        return Moments()
    exact = values.astype("f8")
    mean = float(exact.mean())
    exact -= mean
    # Not by BLAS, whose threads wait for more at the cost of other processes, and whose sums depend on their number.
    return Moments(values.size, mean, float(np.einsum("i,i", exact, exact)))


def measure(fields: np.ndarray, variable: Variable) -> dict[str, Any]:
    """What `merge` needs of (T, H, W) consecutive hours, NaN where missing; hour by hour, which stays in the cache."""
    plain, logarithmic, tendency = Moments(), Moments(), Moments()
    histogram = np.zeros(BINS, "i8")
    low, high = np.inf, -np.inf
    start, width = _bins(variable)
    before: np.ndarray | None = None
    for hour in fields:
        valid = np.isfinite(hour)
        values = hour.ravel() if valid.all() else hour[valid]
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
            plain.merge(moments(values))
            scaled = values
            if variable.is_logarithmic:
                scaled = np.log(values + np.float32(1.0))
                logarithmic.merge(moments(scaled))
            places = ((scaled - np.float32(start)) * np.float32(1.0 / width)).astype("i4")
            histogram += np.bincount(np.clip(places, 0, BINS - 1), minlength=BINS)
            if before is not None:
                change = (hour - before).ravel()
                tendency.merge(moments(change if valid.all() and np.isfinite(change).all() else change[np.isfinite(change)]))
            before = hour
    filled = np.flatnonzero(histogram)
    return {
        "moments": _as_list(plain),
        "log_moments": _as_list(logarithmic),
        "tendency": _as_list(tendency),
        "min": low,
        "max": high,
        "histogram": [filled.tolist(), histogram[filled].tolist()],
    }


def merge(parts: list[dict[str, Any]], variable: Variable) -> dict[str, float]:
    """Statistics of all parts together, in their order.

    Returns:
        mean, std, min, max, count, q01 .. q99, tendency (standard deviation of the change from one analysis to the next
        inside a shard); of pollutants also log_mean, log_std.

    Raises:
        DataError: the variable is constant.
    """
    plain, logarithmic, tendency = Moments(), Moments(), Moments()
    histogram = np.zeros(BINS, "i8")
    for part in parts:
        plain.merge(Moments(*part["moments"]))
        logarithmic.merge(Moments(*part["log_moments"]))
        tendency.merge(Moments(*part["tendency"]))
        histogram[part["histogram"][0]] += np.array(part["histogram"][1], "i8")
    if plain.count and plain.m2 == 0.0:
        raise DataError(f"'{variable.name}' is constant ({plain.mean:g}) over the training split; it cannot be normalised.")
    low, high = min(part["min"] for part in parts), max(part["max"] for part in parts)
    numbers = {"mean": plain.mean, "std": plain.std(), "min": low, "max": high, "count": float(plain.count)}
    if plain.count:
        numbers |= {f"q{round(100 * q):02d}": min(max(_quantile(histogram, q, variable), low), high) for q in QUANTILES}
        numbers["tendency"] = tendency.std()
        if variable.is_logarithmic:
            numbers |= {"log_mean": logarithmic.mean, "log_std": logarithmic.std()}
    return numbers


def _bins(variable: Variable) -> tuple[float, float]:
    """Start and width of the bins, in log(1 + x) where the variable is logarithmic."""
    ends = np.array([variable.valid_min, variable.valid_max])
    if variable.is_logarithmic:
        ends = np.log1p(ends)
    return float(ends[0]), float((ends[1] - ends[0]) / BINS)


def _quantile(histogram: np.ndarray, share: float, variable: Variable) -> float:
    """Linear inside a bin: off by a bin's width at most."""
    start, width = _bins(variable)
    below = np.concatenate([[0], np.cumsum(histogram)])
    wanted = share * below[-1]
    place = int(np.clip(np.searchsorted(below, wanted, side="right") - 1, 0, BINS - 1))
    inside = (wanted - below[place]) / histogram[place] if histogram[place] else 0.0
    value = start + (place + inside) * width
    return float(np.expm1(value)) if variable.is_logarithmic else float(value)


def _as_list(m: Moments) -> list[float]:
    return [m.count, m.mean, m.m2]
