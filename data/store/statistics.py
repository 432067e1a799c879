"""Mergeable statistics of a variable: moments and extremes, of pollutants also moments of logarithms.

Everything is measured a shard at a time and merged, so that shards may be written by any process in any order and the
result is the same to the bit. Pollutants are also measured as log(1 + x), x in ug m-3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data import DataError
from data.variables import Variable


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
    plain, logarithmic = Moments(), Moments()
    low, high = np.inf, -np.inf
    for hour in fields:
        valid = np.isfinite(hour)
        values = hour.ravel() if valid.all() else hour[valid]
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
            plain.merge(moments(values))
            if variable.is_logarithmic:
                logarithmic.merge(moments(np.log(values + np.float32(1.0))))
    return {"moments": _as_list(plain), "log_moments": _as_list(logarithmic), "min": low, "max": high}


def merge(parts: list[dict[str, Any]], variable: Variable) -> dict[str, float]:
    """Statistics of all parts together, in their order.

    Returns:
        mean, std, min, max, count; of pollutants also log_mean, log_std.

    Raises:
        DataError: the variable is constant.
    """
    plain, logarithmic = Moments(), Moments()
    for part in parts:
        plain.merge(Moments(*part["moments"]))
        logarithmic.merge(Moments(*part["log_moments"]))
    if plain.count and plain.m2 == 0.0:
        raise DataError(f"'{variable.name}' is constant ({plain.mean:g}) over the training split; it cannot be normalised.")
    low, high = min(part["min"] for part in parts), max(part["max"] for part in parts)
    numbers = {"mean": plain.mean, "std": plain.std(), "min": low, "max": high, "count": float(plain.count)}
    if plain.count and variable.is_logarithmic:
        numbers |= {"log_mean": logarithmic.mean, "log_std": logarithmic.std()}
    return numbers


def _as_list(m: Moments) -> list[float]:
    return [m.count, m.mean, m.m2]
