"""How the hours of files are read: which lead times of forecasts, and in which time zone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """How the hours of files are read."""

    lead_hours: tuple[float, ...] | None = None  # of forecasts, those to take; None: all, each hour once
    zone: float = 0.0  # hours that the times in files are ahead of UTC
    stamps: str = "end"  # where in an averaged hour its time lies; means are stored at the end, when all of it is known
    name_zone: float | None = None  # the same of an hour that stands in a file's name only; None: it has to be said

    def described(self) -> str:
        """For the output and the provenance."""
        named = "" if self.name_zone is None else f", in names {self.name_zone:+g} h"
        of_means = "" if self.stamps == "end" else f", at the {self.stamps} of averaged hours"
        return f"times in files are UTC{self.zone:+g} h{named}{of_means}"


STAMPS = ("end", "centre")
DEFAULT_CLOCK = Clock()
