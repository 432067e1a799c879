"""A source: files that are read alike, and how; several of them, each on its own grid, may make one store."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data import DataError
from data.prepare.inputs.given import expand
from data.prepare.sources.spellings import (
    DEW_POINT,
    OF_A_MAP,
    SOURCES,
    Named,
    fields_of,
    name_zone,
    read_lines,
    read_yaml,
    require_text,
)
from data.variables import ALWAYS, Variable

KINDS = (*SOURCES, "generic")
STAMPS = ("end", "centre")
WINDS = ("earth", "grid")
METHODS = ("bilinear", "conservative")
FURTHEST = 14  # hours that a zone is ahead of UTC, or 12 behind it
OF_SOURCES = "list sources, as  - {kind: cams, files: cams/*.zip, map: {u: , v: , temp: , rh: , psfc: }}"


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


DEFAULT_CLOCK = Clock()


@dataclass(frozen=True)
class Source:
    """Files that are read alike."""

    kind: str
    fields: dict[str, Named]
    files: list[Path]
    clock: Clock = DEFAULT_CLOCK
    winds: str = "earth"  # or "grid": u and v of the files lie along the axes of their grid
    method: str | None = None  # of regridding; None: conservative where the target is coarser


def clock_of(kind: str, lead: Iterable[float] | None, zone: float | None, stamps: str, where: str) -> Clock:
    """What a user said of times; of a source that is known, the zone of hours in names goes without saying.

    Raises:
        DataError: there is no such zone; YAML takes 8:00 for 480.
    """
    if zone is not None and not -12 <= zone <= FURTHEST:
        raise DataError(f"{where}: a time zone is -12 to {FURTHEST} hours ahead of UTC, as 8 or 5.5, not {zone:g}.")
    named = name_zone(kind) if zone is None else float(zone)
    return Clock(tuple(sorted(map(float, lead))) if lead else None, float(zone or 0), stamps, named)


def read_sources(path: Path, defined: tuple[Variable, ...]) -> tuple[Source, ...]:
    """The sources that a YAML file lists, each with the options that `prepare` has for one.

    Raises:
        DataError: it lists none, an entry is wrong, or a variable is in two of them or defined and in none.
    """
    listed = read_yaml(path)
    if not isinstance(listed, list) or not listed or not all(isinstance(about, dict) for about in listed):
        raise DataError(f"{path}: {OF_SOURCES}")
    sources = tuple(_source(about, f"{path}: source {number}", defined) for number, about in enumerate(listed, 1))
    first: dict[str, int] = {}
    for number, source in enumerate(sources, 1):
        for name in ("rh" if name == DEW_POINT else name for name in source.fields):
            if first.setdefault(name, number) != number:
                both = [f"source {n} ({sources[n - 1].kind})" for n in (first[name], number)]
                known = source.kind in SOURCES or sources[first[name] - 1].kind in SOURCES
                how = f"by `{name}:` in the map of one that is not generic" if known else "without a line for it in its map"
                raise DataError(f"{path}: '{name}' is read from {' and '.join(both)}: leave it out of one of them, {how}.")
    unread = [variable.name for variable in defined if variable.name not in first]
    if unread:
        raise DataError(
            f"{path}: no source has {', '.join(unread)} of --variables: add a line to the map of the one that does."
        )
    return sources


def files_of(sources: Iterable[Source]) -> list[Path]:
    """Of all sources, in their order."""
    return [file for source in sources for file in source.files]


def winds_of(sources: Iterable[Source]) -> str:
    """How the winds lie: u and v along a grid are of one source."""
    return next(source.winds for source in sources if "u" in source.fields)


def require_wind(fields: Iterable[str], where: str) -> None:
    """
    Raises:
        DataError: the wind is not among them.
    """
    absent = [name for name in ALWAYS if name not in fields]
    if absent:
        raise DataError(f"{where}: nothing is given for {', '.join(absent)}; the wind is always needed.")


def written_down(sources: tuple[Source, ...]) -> dict[str, Any]:
    """What a plan says of its sources; of one source without a list, as plans of the first versions do."""
    listed: list[dict[str, Any]] = json.loads(json.dumps([asdict(source) for source in sources], default=str))
    if len(listed) > 1:
        return {"sources": listed}
    return listed[0] | {"source": listed[0].pop("kind")}


def sources_in(plan: dict[str, Any]) -> tuple[Source, ...]:
    """Those of a plan that was written down."""
    return tuple(map(_restored, plan.get("sources") or [plan | {"kind": plan["source"]}]))


def _restored(about: dict[str, Any]) -> Source:
    fields = {name: Named(**{**line, "spellings": tuple(line["spellings"])}) for name, line in about["fields"].items()}
    stated = about["clock"]
    clock = Clock(**{**stated, "lead_hours": stated["lead_hours"] and tuple(stated["lead_hours"])})
    files = [Path(file) for file in about["files"]]
    return Source(about["kind"], fields, files, clock, about["winds"], about["method"])


def _source(about: dict[str, Any], where: str, defined: tuple[Variable, ...]) -> Source:
    require_text(about, where)
    wrong = set(about) - {"kind", "files", "map", "lead", "zone", "stamps", "winds", "method"}
    if wrong or not {"kind", "files"} <= set(about):
        raise DataError(
            f"{where}: {', '.join(map(str, wrong)) or 'kind or files'} {'is unknown' if wrong else 'is missing'}: a source has "
            "kind and files, and may have map, lead, zone, stamps, winds and method."
        )
    choices = {"kind": KINDS, "stamps": STAMPS, "winds": WINDS, "method": (None, *METHODS)}
    stated = {"stamps": "end", "winds": "earth", "method": None} | about
    for key, allowed in choices.items():
        if stated[key] not in allowed:
            raise DataError(f"{where}: {key} is {stated[key]!r}, not one of {', '.join(filter(None, allowed))}.")
    lead, zone = ([hours] if isinstance(hours, (int, float)) else hours for hours in (about.get("lead"), about.get("zone")))
    if not all(_are_numbers(hours) for hours in (lead, zone)) or (zone and len(zone) > 1):
        raise DataError(f"{where}: lead takes hours, as 3 or [3, 6], and zone the hours ahead of UTC, as 8.")
    lines = {} if about.get("map") is None else about["map"]
    if isinstance(lines, str):
        lines = read_lines(Path(lines), OF_A_MAP)
    if not isinstance(lines, dict):
        raise DataError(f"{where}: map is a file, or lines, as  map: {{pm25: {{name: PM2.5, units: ug/m3}}, so2: }}")
    files = about["files"] if isinstance(about["files"], list) else [about["files"]]
    kind = stated["kind"]
    clock = clock_of(kind, lead, zone[0] if zone else None, stated["stamps"], where)
    fields = fields_of(kind, lines, where, defined)
    if not fields:
        raise DataError(f"{where} reads nothing: give it a map with a line for each variable that it has, or remove it.")
    if stated["winds"] == "grid" and not {"u", "v"} <= set(fields):
        raise DataError(f"{where}: winds along the grid are turned together: read both u and v here, or remove `winds`.")
    return Source(kind, fields, expand([str(file) for file in files]), clock, stated["winds"], stated["method"])


def _are_numbers(hours: Any) -> bool:
    return hours is None or (isinstance(hours, list) and all(type(hour) in (int, float) and abs(hour) < 1e6 for hour in hours))
