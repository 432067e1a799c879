"""The height of the sun and the season, from time and place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

J2000 = 262_980.0  # hours from 1970-01-01 00:00 to 2000-01-01 12:00, both UTC
YEAR = 365.2425 * 24.0  # hours


def cosine_of_zenith(hours: Tensor, lat: Tensor, lon: Tensor) -> Tensor:
    """Cosine of the angle between the sun and the zenith, 0 below the horizon; without refraction.

    Args:
        hours: (B,) float64 since 1970-01-01 00:00 UTC.
        lat, lon: (H,) and (W,) float64 degrees.

    Returns:
        (B, H, W) float64.
    """
    return cosine_of_zenith_at(hours[:, None, None], lat[:, None], lon)


def cosine_of_zenith_at(hours: Tensor, lat: Tensor, lon: Tensor) -> Tensor:
    """The same at points: hours, latitudes and longitudes are broadcast.

    The almanac's low-precision formulas, 0.01 degrees between 1950 and 2050 (Michalsky 1988, Solar Energy 40, 227).
    """
    days = (hours - J2000) / 24.0
    mean_longitude = torch.remainder(280.460 + 0.9856474 * days, 360.0)
    anomaly = torch.deg2rad(torch.remainder(357.528 + 0.9856003 * days, 360.0))
    longitude = torch.deg2rad(mean_longitude + 1.915 * anomaly.sin() + 0.020 * (2 * anomaly).sin())
    obliquity = torch.deg2rad(23.439 - 0.0000004 * days)
    right_ascension = torch.atan2(obliquity.cos() * longitude.sin(), longitude.cos())
    declination = torch.asin(obliquity.sin() * longitude.sin())
    sidereal = torch.remainder(6.697375 + 0.0657098242 * days + torch.remainder(hours, 24.0), 24.0) * 15.0  # at Greenwich
    # What depends on the hour alone is exact; the rest as exact as the places are.
    noon = (torch.deg2rad(sidereal) - right_ascension).to(lon.dtype)
    along, across = declination.sin().to(lat.dtype), declination.cos().to(lat.dtype)
    up = torch.deg2rad(lat)
    return (along * up.sin() + across * up.cos() * (noon + torch.deg2rad(lon)).cos()).clamp(min=0.0)


def season(hours: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of the time of the year, (B,) each; hours since 1970-01-01 00:00 UTC."""
    angle = 2 * math.pi * hours / YEAR
    return angle.sin(), angle.cos()
