"""Everything that determines a prepared store."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.prepare.grids.grid import Grid
from data.prepare.sources import spellings
from data.prepare.sources.spellings import DEFAULT_CLOCK, Clock
from data.variables import KNOWN, PUBLISHED, Contents, Variable, contents

PLAN = "plan.json"  # in the parts of an unfinished store, and in a finished one


@dataclass(frozen=True)
class Scan:
    """The wind scan whose sectors are computed in the same pass."""

    out: Path
    patch: int = 2
    regions: tuple[int, int] = (32, 32)
    sectors: int = 16


@dataclass(frozen=True)
class Plan:
    """Everything that determines a prepared store; a restart must bring the same one."""

    source: str
    fields: dict[str, spellings.Named]
    files: list[Path]
    lat: tuple[float, float]  # southern and northern border of the target, degrees
    lon: tuple[float, float]  # western and eastern border
    grid: tuple[int, int]
    splits: dict[str, tuple[str, str]]  # name -> first and last day, YYYY-MM-DD, both inside
    elevation: str | None = None  # FILE, FILE:VARIABLE or FILE:VARIABLE[dimension=place]; None: of the files themselves
    population: str | None = None
    land_mask: str | None = None
    domain: str | None = None
    method: str | None = None  # None: conservative where the target is coarser
    shard_hours: int = 120
    scan: Scan | None = field(default=None)
    clock: Clock = DEFAULT_CLOCK
    clip: tuple[str, ...] = ()  # variables whose impossible values become the nearest possible one
    mask_beyond: tuple[str, ...] = ()  # variables whose impossible values become missing
    winds: str = "earth"  # or "grid": u and v of the files lie along the axes of their grid
    defined: tuple[Variable, ...] = ()  # variables that the user has defined

    @property
    def contents(self) -> Contents:
        """What the store will hold: the fields that are read, and the static ones."""
        read = {"rh" if name == spellings.DEW_POINT else name for name in self.fields} | set(PUBLISHED.names("static"))
        return contents(variable for variable in (*KNOWN, *self.defined) if variable.name in read)

    @property
    def target(self) -> Grid:
        """Cell centres, northern row first."""
        (south, north), (west, east), (rows, cols) = self.lat, self.lon, self.grid
        down, right = (np.arange(rows) + 0.5) / rows, (np.arange(cols) + 0.5) / cols
        return Grid(north - down * (north - south), west + right * (east - west))

    def identity(self) -> dict[str, Any]:
        """What a restart is compared with; what the files hold is compared by their content (identity.py)."""
        described: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        if not self.defined:  # or plans of the first versions would be others
            described.pop("defined")
        return described


def sha256_of(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
