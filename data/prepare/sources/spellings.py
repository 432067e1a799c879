"""How sources call their variables, and in which units those are where files say nothing: one file a source, in known/."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from data import DataError
from data.strict import parse_yaml
from data.variables import BY_NAME, PUBLISHED, Contents, Variable

DEW_POINT = "dew_point"  # read where a source has no relative humidity
FOLDER = Path(__file__).parent / "known"
SOURCES = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
OF_A_MAP = "write one line a variable, as  pm25: {name: PM2.5, units: ug/m3}"


@dataclass(frozen=True)
class Named:
    """How a source's files call one field, and its unit where they state none."""

    spellings: tuple[str, ...]
    units: str
    stated: bool = False  # by the user's map: then it overrules what the file says
    level: float | None = None  # which one of several, by its value, or by its place where files state none


def spelling(held: Container[Hashable], named: Named) -> str | None:
    """The name of a field among those that a file holds, None if it has it not."""
    return next((name for name in named.spellings if name in held), None)


def known_fields(source: str) -> dict[str, Named]:
    """What a source's files hold; of `generic`, nothing is known."""
    return dict(_known(source)[0]) if source in SOURCES else {}


def name_zone(source: str) -> float | None:
    """Hours ahead of UTC, of an hour that stands in the name of a file only; None where that has to be said."""
    return _known(source)[1] if source in SOURCES else None


@cache
def _known(source: str) -> tuple[dict[str, Named], float | None]:
    about = read_lines(FOLDER / f"{source}.yaml", OF_A_MAP)
    fields = {name: Named(_spellings(line["name"]), line["units"]) for name, line in about["fields"].items()}
    return fields, about.get("name_zone")


def _spellings(name: Any) -> tuple[str, ...]:
    return tuple(map(str, name)) if isinstance(name, list) else (str(name),)


def fields_of(source: str, lines: dict[str, Any], where: str, defined: tuple[Variable, ...]) -> dict[str, Named]:
    """What is read: the fields of a source, changed and completed by the lines of a map.

    Args:
        lines: our name -> {name: file's name or several, units: overrule those of the file, level: one of several}, or
            nothing after the colon to leave the source's field out. The source `generic` has no fields of its own.
        where: the lines stand, for messages.

    Raises:
        DataError: a name that is not known here, or a line that says nothing.
    """
    fields, own = known_fields(source), read_as(defined)
    require_text(lines, where)
    Contents({"": tuple(own.values())}).require(lines, where)
    for name, entry in lines.items():
        instead = fields.pop(DEW_POINT, None) if name == "rh" else None
        if entry is None and (name in fields or instead):
            fields.pop(name, None)
            continue
        if not isinstance(entry, dict) or "name" not in entry:
            raise DataError(
                f"{where}: '{name}' says nothing: write  {name}: {{name: NAME_IN_THE_FILES, units: {own[name].units}}}"
            )
        wrong, level = set(entry) - {"name", "units", "level"}, entry.get("level")
        if wrong or type(level) not in (int, float, type(None)):
            what = f"unknown {', '.join(map(str, wrong))}" if wrong else f"level {level!r}, which is no number"
            raise DataError(f"{where}: '{name}' has {what}: a line has name, and perhaps units and level.")
        fields[name] = Named(_spellings(entry["name"]), str(entry.get("units", own[name].units)), "units" in entry, level)
    static = [name for name in fields if name in PUBLISHED.names("static")]
    if static:
        raise DataError(f"{where}: '{static[0]}' has no time; such fields come with --elevation, --population and --land-mask.")
    return fields


def read_as(defined: tuple[Variable, ...]) -> dict[str, Variable]:
    """What the fields of files become, by name."""
    dew_point = Variable(DEW_POINT, "K", "dew point at 2 m", "dew_point_temperature", 150.0, 340.0)
    return BY_NAME | {variable.name: variable for variable in (*defined, dew_point)}


def read_variables(path: Path) -> tuple[Variable, ...]:
    """Variables that a user defines, from YAML: name -> {units, range, group, long_name, standard_name, typical}.

    Raises:
        DataError: a line lacks its units or range, or has a name that is known already.
    """
    example = "write one line a variable, as  dust: {units: ug m-3, range: [0, 20000], group: chemistry}"
    found = []
    lines = read_lines(path, example)
    require_text(lines, str(path))
    for name, about in lines.items():
        known = {"units", "range", "group", "long_name", "standard_name", "typical"}
        if not isinstance(about, dict) or not {"units", "range"} <= set(about) <= known:
            raise DataError(f"{path}: '{name}' needs units and range, and may have {', '.join(sorted(known))}: {example}")
        if name in BY_NAME:
            raise DataError(f"{path}: '{name}' is known already, in {BY_NAME[name].units}; to read it, add it to --map.")
        (low, high), typical = about["range"], about.get("typical")
        group = str(about.get("group", "own"))
        if group == "static" or not group.isidentifier():
            raise DataError(
                f"{path}: '{name}' cannot be in the group '{group}': use weather, chemistry, or a name of your own."
            )
        description = str(about.get("long_name", name)), str(about.get("standard_name", ""))
        usual = None if typical is None else (float(typical[0]), float(typical[1]))
        found.append(Variable(name, str(about["units"]), *description, float(low), float(high), usual, group))
    return tuple(found)


def read_lines(path: Path, example: str) -> dict[str, Any]:
    """A YAML file that says something of every variable.

    Raises:
        DataError: it is something else.
    """
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise DataError(f"{path}: {example}")
    return tree


def read_yaml(path: Path) -> Any:
    """
    Raises:
        DataError: it is no YAML.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text ({error}).") from error


def require_text(names: Iterable[Any], where: str) -> None:
    """YAML takes `no` for false, and 1 for a number."""
    for name in names:
        if not isinstance(name, str):
            raise DataError(f"{where}: {name!r} is not a name; if it is meant as one, write it in quotes.")
