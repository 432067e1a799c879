"""Everything that determines a prepared store."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.prepare.grids.grid import Grid
from data.prepare.sources.source import Source, files_of, written_down
from data.prepare.sources.spellings import DEW_POINT
from data.variables import KNOWN, PUBLISHED, Contents, Variable, contents, restored

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

    sources: tuple[Source, ...]
    lat: tuple[float, float]  # southern and northern border of the target, degrees
    lon: tuple[float, float]  # western and eastern border
    grid: tuple[int, int]
    splits: dict[str, tuple[str, str]]  # name -> first and last day, YYYY-MM-DD, both inside
    elevation: str | None = None  # FILE, FILE:VARIABLE or FILE:VARIABLE[dimension=place]; None: of the files themselves
    population: str | None = None
    land_mask: str | None = None
    domain: str | None = None
    shard_hours: int = 120
    scan: Scan | None = field(default=None)
    clip: tuple[str, ...] = ()  # variables whose impossible values become the nearest possible one
    mask_beyond: tuple[str, ...] = ()  # variables whose impossible values become missing
    defined: tuple[Variable, ...] = ()  # variables that the user has defined

    @property
    def files(self) -> list[Path]:
        return files_of(self.sources)

    @property
    def contents(self) -> Contents:
        """What the store will hold: the fields that are read, and the static ones."""
        fields = [name for source in self.sources for name in source.fields]
        read = {"rh" if name == DEW_POINT else name for name in fields} | set(PUBLISHED.names("static"))
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
        described.pop("sources")
        if not self.defined:  # or plans of the first versions would be others
            described.pop("defined")
        return described | written_down(self.sources)


def defined_in(plan: dict[str, Any]) -> tuple[Variable, ...]:
    """The variables that a user has defined, of a plan that was written down."""
    return tuple(restored(about) for about in plan.get("defined", []))


def sha256_of(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
