"""A source: files that are read alike, and how; several of them may make one store.

A command line and a YAML file describe it alike (`Entry`). How files of a known source call their
variables stands in known/, one YAML file a source.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from data import DataError
from data.prepare.inputs.given import expand
from data.strict import read_yaml
from data.variables import ALWAYS, BY_NAME, PUBLISHED, Contents, Variable

DEW_POINT = "dew_point"  # read where a source has no relative humidity
FOLDER = Path(__file__).parent / "known"
SOURCES = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
KINDS = (*SOURCES, "generic")
STAMPS = ("end", "centre")
WINDS = ("earth", "grid")
METHODS = ("bilinear", "conservative")
OF_A_MAP = "one line a variable, as  pm25: {name: PM2.5, units: ug/m3}"
OF_SOURCES = "a list of sources, as  - {kind: cams, files: cams/*.zip, map: {u: , v: , temp: , rh: , psfc: }}"
OF_VARIABLES = "one line a variable, as  dust: {units: ug m-3, range: [0, 20000], group: chemistry}"
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Pair = Annotated[list[float], Field(min_length=2, max_length=2)]


@dataclass(frozen=True)
class Named:
    """How a source's files call one field, and its unit where they state none."""

    spellings: tuple[str, ...]
    units: str
    stated: bool = False  # by the user's map: then it overrules what the file says
    level: float | None = None  # which one of several, by its value, or by its place where files state none


@dataclass(frozen=True)
class Clock:
    """How the hours of files are read."""

    lead_hours: tuple[float, ...] | None = None  # of forecasts, those to take; None: all, each hour once
    zone: float = 0.0  # hours that the times in files are ahead of UTC
    stamps: str = "end"  # where in an averaged hour its time lies; means are stored at the end, when all of it is known
    name_zone: float | None = None  # the same of an hour that stands in a file's name only; None: it has to be said

    def described(self) -> str:
        """Say it in the output and the provenance."""
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


class Line(BaseModel):
    """One line of a map: how files call a variable of ours."""

    model_config = STRICT
    name: str | list[str]
    units: str | None = None  # overrule those of the file
    level: float | None = None


class Entry(BaseModel):
    """A source as a user describes it."""

    model_config = STRICT
    kind: str
    files: str | list[str]
    map: str | dict[str, Line | None] | None = None
    lead: float | list[float] | None = None
    zone: Annotated[float, Field(ge=-12, le=14)] | None = None
    stamps: Literal["end", "centre"] = "end"
    winds: Literal["earth", "grid"] = "earth"
    method: Literal["bilinear", "conservative"] | None = None


class Definition(BaseModel):
    """A variable that a user defines."""

    model_config = STRICT
    units: str
    range: Pair
    group: str = "own"
    long_name: str | None = None
    standard_name: str = ""
    typical: Pair | None = None


class _Known(BaseModel):
    model_config = STRICT
    fields: dict[str, Line]
    name_zone: float | None = None


def spelling(held: Container[Hashable], named: Named) -> str | None:
    """The name of a field among those that a file holds, None if it has it not."""
    return next((name for name in named.spellings if name in held), None)


@cache
def _known(kind: str) -> _Known:
    return read_yaml(FOLDER / f"{kind}.yaml", _Known, OF_A_MAP) if kind in SOURCES else _Known(fields={})


def known_fields(kind: str) -> dict[str, Named]:
    """What a source's files hold; of `generic`, nothing is known."""
    return {name: Named(_spellings(line), line.units or "") for name, line in _known(kind).fields.items()}


def _spellings(line: Line) -> tuple[str, ...]:
    return (line.name,) if isinstance(line.name, str) else tuple(line.name)


def source_of(entry: Entry, where: str, defined: tuple[Variable, ...], listed: Path | None = None) -> Source:
    """The source that an entry describes.

    Args:
        where: it stands, for messages.
        defined: variables that the user has defined.
        listed: a text file with further files, one a line.

    Raises:
        DataError: there is no such kind, it reads nothing, or its winds cannot be turned.
    """
    if entry.kind not in KINDS:
        raise DataError(f"{where}: kind is '{entry.kind}', not one of {', '.join(KINDS)}.")
    lines = entry.map or {}
    if isinstance(lines, str):
        where = lines
        lines = read_yaml(Path(lines), dict[str, Line | None], OF_A_MAP)
    fields = _fields(entry.kind, lines, where, defined)
    if not fields:
        raise DataError(f"{where} reads nothing: give it a map with a line for each variable that it has, or remove it.")
    if entry.winds == "grid" and not {"u", "v"} <= set(fields):
        raise DataError(f"{where}: winds along the grid are turned together: read both u and v here, or remove `winds`.")
    lead = entry.lead if isinstance(entry.lead, list) else [entry.lead] if entry.lead is not None else []
    name_zone = _known(entry.kind).name_zone if entry.zone is None else entry.zone
    clock = Clock(tuple(sorted(lead)) if lead else None, entry.zone or 0.0, entry.stamps, name_zone)
    files = [entry.files] if isinstance(entry.files, str) else entry.files
    return Source(entry.kind, fields, expand(files, listed), clock, entry.winds, entry.method)


def read_sources(path: Path, defined: tuple[Variable, ...]) -> tuple[Source, ...]:
    """The sources that a YAML file lists.

    Raises:
        DataError: it lists none, an entry is wrong, or a variable is in two of them or defined and in none.
    """
    entries = read_yaml(path, Annotated[list[Entry], Field(min_length=1)], OF_SOURCES)
    sources = tuple(source_of(entry, f"{path}: entry {number}", defined) for number, entry in enumerate(entries, 1))
    first: dict[str, int] = {}
    for number, source in enumerate(sources, 1):
        for name in map(stored_as, source.fields):
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


def _fields(kind: str, lines: dict[str, Line | None], where: str, defined: tuple[Variable, ...]) -> dict[str, Named]:
    """What is read: the fields of a source, changed and completed by the lines of a map, of which an empty one leaves out."""
    fields, become = known_fields(kind), read_as(defined)
    Contents({"": tuple(become.values())}).require(lines, where)
    for name, line in lines.items():
        instead = fields.pop(DEW_POINT, None) if name == "rh" else None
        if line is not None:
            units = become[name].units if line.units is None else line.units
            fields[name] = Named(_spellings(line), units, line.units is not None, line.level)
        elif fields.pop(name, None) is None and instead is None:
            raise DataError(
                f"{where}: '{name}' says nothing: write  {name}: {{name: NAME_IN_THE_FILES, units: {become[name].units}}}"
            )
    static = [name for name in fields if name in PUBLISHED.names("static")]
    if static:
        raise DataError(f"{where}: '{static[0]}' has no time; such fields come with --elevation, --population and --land-mask.")
    return fields


def stored_as(name: str) -> str:
    """The variable of the store that a field becomes."""
    return "rh" if name == DEW_POINT else name


def read_as(defined: tuple[Variable, ...]) -> dict[str, Variable]:
    """What the fields of files are judged as, by name."""
    dew_point = Variable(DEW_POINT, "K", "dew point at 2 m", "dew_point_temperature", 150.0, 340.0)
    return BY_NAME | {variable.name: variable for variable in (*defined, dew_point)}


def read_variables(path: Path) -> tuple[Variable, ...]:
    """Variables that a user defines, from YAML: name -> {units, range, group, long_name, standard_name, typical}.

    Raises:
        DataError: a line lacks its units or range, or has a name or a group that cannot be.
    """
    found = []
    for name, about in read_yaml(path, dict[str, Definition], OF_VARIABLES).items():
        if name in BY_NAME:
            raise DataError(f"{path}: '{name}' is known already, in {BY_NAME[name].units}; to read it, add it to --map.")
        if about.group == "static" or not about.group.isidentifier():
            raise DataError(
                f"{path}: '{name}' cannot be in the group '{about.group}': use weather, chemistry, or a name of your own."
            )
        (low, high), typical = about.range, about.typical and (about.typical[0], about.typical[1])
        described = about.long_name or name, about.standard_name
        found.append(Variable(name, about.units, *described, low, high, typical, about.group))
    return tuple(found)


def files_of(sources: Iterable[Source]) -> list[Path]:
    """The files of all sources, in their order."""
    return [file for source in sources for file in source.files]


def winds_of(sources: Iterable[Source]) -> str:
    """How the winds lie: u and v along a grid are of one source."""
    return next(source.winds for source in sources if "u" in source.fields)


def require_wind(sources: Iterable[Source], where: str) -> None:
    """Require that some source has the wind.

    Raises:
        DataError: none has.
    """
    fields = {name for source in sources for name in source.fields}
    absent = [name for name in ALWAYS if name not in fields]
    if absent:
        raise DataError(f"{where}: nothing is given for {', '.join(absent)}; the wind is always needed.")
