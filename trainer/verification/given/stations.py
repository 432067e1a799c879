"""Observations of stations, for scripts that import them from here (data/given/stations.py)."""

from data.given.stations import read

__all__ = ["read"]
