"""Everything that determines a prepared store, and how it is written down."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from data import DataError
from data.prepare.grids.grid import Grid
from data.prepare.sources.source import Source, files_of, stored_as
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
    scan: Scan | None = None
    clip: tuple[str, ...] = ()  # variables whose impossible values become the nearest possible one
    mask_beyond: tuple[str, ...] = ()  # variables whose impossible values become missing
    defined: tuple[Variable, ...] = ()  # variables that the user has defined
    base: Path | None = None  # the store that hours are appended to
    before: str = ""  # its fingerprint

    @property
    def files(self) -> list[Path]:
        return files_of(self.sources)

    @property
    def contents(self) -> Contents:
        """What the store will hold: the fields that are read, and the static ones."""
        read = {stored_as(name) for source in self.sources for name in source.fields} | set(PUBLISHED.names("static"))
        return contents(variable for variable in (*KNOWN, *self.defined) if variable.name in read)

    @property
    def target(self) -> Grid:
        """Cell centres, northern row first."""
        (south, north), (west, east), (rows, cols) = self.lat, self.lon, self.grid
        down, right = (np.arange(rows) + 0.5) / rows, (np.arange(cols) + 0.5) / cols
        return Grid(north - down * (north - south), west + right * (east - west))

    def tree(self) -> dict[str, Any]:
        """The plan as JSON has it; what the files hold is compared by their content (identity.py)."""
        tree: dict[str, Any] = _PLAN.dump_python(self, mode="json")
        return tree

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.tree(), sort_keys=True).encode()).hexdigest()


_PLAN = TypeAdapter(Plan)


def read_plan(path: Path) -> Plan:
    """A plan that was written down.

    Raises:
        DataError: another version of this program wrote it.
        FileNotFoundError: there is none.
    """
    try:
        return _PLAN.validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise DataError(
            f"{path.parent} was begun or prepared by another version: remove it, and what was begun beside it, and prepare "
            "all files together."
        ) from error
