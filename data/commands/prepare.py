"""Turn the NetCDF files of a reanalysis into a store: regridded, in parallel, restartable."""

from __future__ import annotations

import argparse
from pathlib import Path

from data import DataError
from data.prepare.plan import Plan, Scan
from data.prepare.sources.source import (
    KINDS,
    METHODS,
    OF_A_MAP,
    STAMPS,
    WINDS,
    Entry,
    Line,
    Source,
    read_sources,
    read_variables,
    require_wind,
    source_of,
)
from data.strict import checked, read_yaml
from data.variables import KNOWN, Variable, contents

EXAMPLES = """  python -m data prepare caqra datasets/china.zarr 'raw/*.tar.gz' --workers 8 \\
    --lat 17.2 54.8 --lon 73.1 135.9 --grid 128 256 --elevation etopo.nc:z --population gpw.nc --land-mask land.nc \\
    --train 2013-01-01 2016-12-31 --validation 2017-01-01 2017-12-31 --test 2018-01-01 2018-12-31
  mpirun -n 64 python -m data prepare caqra ...          all ranks share the work
  python -m data prepare caqra ... --stage begin         then, in an array task: --stage load --part 3 64
  python -m data prepare caqra ... --stage finish        when all tasks are done
  python -m data prepare several datasets/asia.zarr --config sources.yaml ...      each with its own map, hours and grid

Interrupt it anywhere and run it again: what is done is verified and kept."""
SPLITS = ("train", "validation", "test")
OF_ONE_SOURCE = ("files", "files_from", "map", "method", "lead", "zone", "stamps", "winds")  # which --config has for each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", choices=[*KINDS, "several"], help="what the files are; `generic` with --map, `several` with --config")
    add("store", type=Path, help="directory of the new store")
    given = "NetCDF files, zarr stores, archives or directories of them, patterns in quotes; in any order"
    add("files", nargs="*", metavar="FILE", help=given)
    add("--files-from", type=Path, metavar="LIST", help="a text file with one more FILE a line")
    listed = "YAML, for `several`: a list of sources, as  - {kind: cams, files: cams/*.zip, map: {u: , v: }, zone: 0}"
    add("--config", type=Path, metavar="SOURCES", help=listed)
    mapped = "YAML: how your files call variables, as  pm25: {name: PM2.5, units: ug/m3}; a line `so2:` leaves one out"
    add("--map", type=Path, help=mapped)
    own = "YAML: variables of your own, as  dust: {units: ug m-3, range: [0, 20000], group: chemistry}"
    add("--variables", type=Path, help=own)
    add("--lat", type=float, nargs=2, required=True, metavar=("SOUTH", "NORTH"), help="borders, degrees")
    add("--lon", type=float, nargs=2, required=True, metavar=("WEST", "EAST"))
    add("--grid", type=int, nargs=2, default=[128, 256], metavar=("ROWS", "COLS"))
    add("--method", choices=METHODS, help="default: conservative where the target is coarser")
    add("--lead", type=float, nargs="+", metavar="HOURS", help="of forecasts: only these lead times")
    ahead = "time zone of the files' hours, hours ahead of UTC (default: UTC; CAQRA's hours in file names: 8)"
    add("--zone", type=float, metavar="HOURS", help=ahead)
    add("--stamps", choices=STAMPS, help="where the times of hourly means lie in their hour (default: end)")
    along = "u and v: eastward and northward, or along the files' grid (default: earth)"
    add("--winds", choices=WINDS, help=along)
    clipped = "set impossible values of this variable to the nearest possible one; repeatable"
    add("--clip", action="append", default=[], metavar="NAME", help=clipped)
    add("--mask-beyond", action="append", default=[], metavar="NAME", help="take impossible values of a variable for missing")
    for split in SPLITS:
        add(f"--{split}", nargs=2, required=split == "train", metavar=("FIRST", "LAST"), help="days, inclusive")
    for name, unit in (("elevation", "m"), ("population", "km-2"), ("land-mask", "0 to 1")):
        own = f"NetCDF, {unit} (default: what the files themselves hold); one of several fields as FILE:VARIABLE[raster=4]"
        add(f"--{name}", metavar="FILE[:VARIABLE]", help=own)
    add("--domain", help="where the forecast is scored: .npy, NetCDF, or GeoJSON polygons (default: everywhere)")
    add("--shard-hours", type=int, default=Plan.shard_hours)
    add("--wind-scan", type=Path, metavar="OUT", help="compute the wind-scan cache in the same pass")
    add("--regions", type=int, nargs=2, default=list(Scan.regions), metavar=("ROWS", "COLS"), help="of the wind scan")
    add("--patch", type=int, default=Scan.patch, help="of the wind scan, pixels")
    add("--workers", type=int, default=1, help="processes on this machine")
    add("--stage", choices=["begin", "load", "finish"], help="only this stage, for a scheduler's array tasks")
    add("--part", type=int, nargs=2, default=[0, 1], metavar=("I", "N"), help="of --stage load: 0 <= I < N")


def run(options: argparse.Namespace) -> None:
    if options.map is None and options.source == "generic":
        raise DataError("the source `generic` needs --map, which says how your files call their variables.")
    part, parts = options.part
    if not 0 <= part < parts or (parts > 1 and options.stage != "load"):
        raise DataError("--part I N needs --stage load and 0 <= I < N.")
    plan = plan_of(options)

    from data.prepare import stages
    from data.process.ranks import world

    if options.stage is None:
        stages.prepare(options.store, plan, options.workers)
    else:
        stages.stage(options.store, plan, options.stage, part, parts, options.workers)
    if options.stage in (None, "finish") and world().is_main:
        show_result(options.store)


def plan_of(options: argparse.Namespace) -> Plan:
    """What the options ask for."""
    defined = read_variables(options.variables) if options.variables else ()
    sources = sources_of(options, defined)
    contents([*KNOWN, *defined]).require([*options.clip, *options.mask_beyond], "--clip and --mask-beyond")
    scan = Scan(options.wind_scan, options.patch, tuple(options.regions)) if options.wind_scan else None
    return Plan(
        sources=sources,
        clip=tuple(sorted(options.clip)),
        mask_beyond=tuple(sorted(options.mask_beyond)),
        lat=(min(options.lat), max(options.lat)),
        lon=tuple(options.lon),
        grid=tuple(options.grid),
        splits={name: tuple(days) for name in SPLITS if (days := getattr(options, name))},
        elevation=options.elevation,
        population=options.population,
        land_mask=options.land_mask,
        domain=options.domain,
        shard_hours=options.shard_hours,
        scan=scan,
        defined=defined,
    )


def sources_of(options: argparse.Namespace, defined: tuple[Variable, ...]) -> tuple[Source, ...]:
    """The one source that the options describe, or those of --config."""
    if options.source == "several" or options.config:
        stated = [name for name in OF_ONE_SOURCE if getattr(options, name) not in (None, [])]
        if options.source != "several" or not options.config or stated:
            named = f" (not {', '.join(stated)} beside it)" if stated else ""
            raise DataError(f"`several` and --config SOURCES belong together, and SOURCES says all of each source{named}.")
        sources = read_sources(options.config, defined)
        require_wind(sources, str(options.config))
        return sources
    mapped = read_yaml(options.map, dict[str, Line | None], OF_A_MAP) if options.map else {}
    lines = {variable.name: Line(name=variable.name) for variable in defined} | mapped
    of_ours = [variable.name for variable in defined]
    lines = {name: line for name, line in lines.items() if line is not None or name not in of_ours}
    where = str(options.map or options.variables or options.source)
    about = {"kind": options.source, "files": options.files, "map": lines}
    flags = {name: getattr(options, name) for name in ("lead", "zone", "stamps", "winds", "method")}
    about |= {name: value for name, value in flags.items() if value is not None}
    entry = checked(Entry, about, "prepare", "--zone and --lead as hours: 8 or 5.5")
    source = source_of(entry, where, defined, options.files_from)
    require_wind([source], where)
    return (source,)


def show_result(path: Path) -> None:
    from data.command_line import console
    from data.commands.inspect import show_ozone, show_years
    from data.store import picture
    from data.store.opening import open_store

    store = open_store(path)
    show_years(store, console())
    show_ozone(store)
    print(f"wrote {path}, fingerprint {store.fingerprint[:12]}; look at {picture.draw(store)}")
