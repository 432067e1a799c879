"""`python -m data COMMAND`: build, describe and check what is read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from data import DataError, benchmark, legacy_scan, prepare, sources, variables, wind_scan
from data.store import DYNAMIC_GROUPS, Store, open_store, verify
from data.synthesize import Recipe, synthesize

console = Console(width=max(110, Console().width))


def synthesize_command(argv: list[str]) -> None:
    """write a small physical reanalysis over real East Asian terrain"""
    parser = _parser("synthesize", synthesize_command, "python -m data synthesize datasets/demo.zarr --days 90 --grid 64 128")
    parser.add_argument("store", type=Path, help="directory of the new store")
    parser.add_argument("--days", type=int, default=Recipe.days)
    parser.add_argument("--grid", type=int, nargs=2, default=[Recipe.rows, Recipe.cols], metavar=("ROWS", "COLS"),
                        help="any grid that divides 128 x 256 (default 64 128)")  # fmt: skip
    parser.add_argument("--start", default=Recipe.start, help="first day, YYYY-MM-DD")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--blocking", type=float, default=Recipe.blocking, help="how strongly climbs hold air back, per km")
    parser.add_argument("--missing", type=float, default=Recipe.missing, help="share of pollutant cells to hide")
    parser.add_argument("--train", type=float, default=Recipe.train, help="share of the hours in the training split")
    parser.add_argument("--validation", type=float, default=Recipe.validation, help="share in the validation split")
    parser.add_argument("--shard-hours", type=int, default=Recipe.shard_hours)
    a = parser.parse_args(argv)
    recipe = Recipe(a.days, a.grid[0], a.grid[1], a.start, a.seed, a.blocking, a.missing, a.train, a.validation,
                    a.shard_hours)  # fmt: skip
    fingerprint = synthesize(a.store, recipe)
    console.print(f"wrote {a.store}: {a.days} days on {a.grid[0]} x {a.grid[1]} cells, fingerprint {fingerprint[:12]}")


def prepare_command(argv: list[str]) -> None:
    """turn the NetCDF files of a reanalysis into a store: regridded, in parallel, restartable"""
    parser = _parser(
        "prepare",
        prepare_command,
        """python -m data prepare caqra datasets/china.zarr raw/*.nc --workers 8 \\
    --lat 17.2 54.8 --lon 73.1 135.9 --grid 128 256 --elevation etopo.nc:z --population gpw.nc --land-mask land.nc \\
    --train 2013-01-01 2016-12-31 --validation 2017-01-01 2017-12-31 --test 2018-01-01 2018-12-31
  mpirun -n 64 python -m data prepare caqra ...          all ranks share the work
  python -m data prepare caqra ... --stage begin         then, in an array task: --stage load --part 3 64
  python -m data prepare caqra ... --stage finish        when all tasks are done

Interrupt it anywhere and run it again: what is done is verified and kept.""",
    )
    parser.add_argument("source", choices=[*sources.SOURCES, "generic"])
    parser.add_argument("store", type=Path, help="directory of the new store")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="NetCDF files, in any order")
    parser.add_argument("--map", type=Path, help="YAML of a generic source:  pm25: {name: PM2.5, units: ug/m3}")
    parser.add_argument("--lat", type=float, nargs=2, required=True, metavar=("SOUTH", "NORTH"), help="borders, degrees")
    parser.add_argument("--lon", type=float, nargs=2, required=True, metavar=("WEST", "EAST"))
    parser.add_argument("--grid", type=int, nargs=2, default=[128, 256], metavar=("ROWS", "COLS"))
    parser.add_argument(
        "--method", choices=["bilinear", "conservative"], help="default: conservative where the target is coarser"
    )
    parser.add_argument("--lead", type=float, nargs="+", metavar="HOURS", help="of forecasts: only these lead times")
    for split in ("train", "validation", "test"):
        parser.add_argument(f"--{split}", nargs=2, required=split == "train", metavar=("FIRST", "LAST"), help="days, inclusive")
    for name in ("elevation", "population", "land-mask"):
        parser.add_argument(f"--{name}", required=True, metavar="FILE[:VARIABLE]", help="NetCDF; m, km-2, and 0 to 1")
    parser.add_argument(
        "--domain", help="where the forecast is scored: .npy, NetCDF, or GeoJSON polygons (default: everywhere)"
    )
    parser.add_argument("--shard-hours", type=int, default=prepare.Plan.shard_hours)
    parser.add_argument("--wind-scan", type=Path, metavar="OUT", help="compute the wind-scan cache in the same pass")
    parser.add_argument("--regions", type=int, nargs=2, default=[32, 32], metavar=("ROWS", "COLS"), help="of the wind scan")
    parser.add_argument("--patch", type=int, default=prepare.Scan.patch, help="of the wind scan, pixels")
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine")
    parser.add_argument("--stage", choices=["begin", "load", "finish"], help="only this stage, for a scheduler's array tasks")
    parser.add_argument("--part", type=int, nargs=2, default=[0, 1], metavar=("I", "N"), help="of --stage load: 0 <= I < N")
    a = parser.parse_args(argv)
    if (a.map is None) == (a.source == "generic"):
        raise DataError("--map belongs to the source `generic`, which needs it.")
    if not 0 <= a.part[0] < a.part[1] or (a.part != [0, 1] and a.stage != "load"):
        raise DataError("--part I N needs --stage load and 0 <= I < N.")
    scan = prepare.Scan(a.wind_scan, a.patch, tuple(a.regions)) if a.wind_scan else None
    plan = prepare.Plan(
        source=a.source, fields=sources.read_map(a.map) if a.map else sources.SOURCES[a.source], files=sorted(a.files),
        lead_hours=tuple(sorted(a.lead)) if a.lead else None, lat=(min(a.lat), max(a.lat)), lon=tuple(a.lon),
        grid=tuple(a.grid),
        splits={s: tuple(days) for s in ("train", "validation", "test") if (days := getattr(a, s))},
        elevation=a.elevation, population=a.population, land_mask=a.land_mask, domain=a.domain, method=a.method,
        shard_hours=a.shard_hours, scan=scan,
    )  # fmt: skip
    if a.stage is None:
        prepare.prepare(a.store, plan, a.workers)
    elif a.stage == "begin":
        prepare.begin(a.store, plan)
    elif prepare.require_same_plan(a.store, plan):
        if a.stage == "load":
            prepare.load(a.store, prepare.remaining(a.store, *a.part), a.workers)
        else:
            prepare.finish(a.store)
    if a.stage in (None, "finish") and prepare.is_first_rank():
        from data import quicklook  # every worker process imports this module, and matplotlib takes a second

        store = open_store(a.store)
        _show_years(store)
        console.print(f"wrote {a.store}, fingerprint {store.fingerprint[:12]}; look at {quicklook.draw(store)}")


def _show_years(store: Store) -> None:
    table = Table("year", "hours", "gaps", "variable", "missing %", "least", "greatest", title="summary of years")
    for year, about in store.years.items():
        for name, entry in about["variables"].items():
            ends = ["-", "-"] if entry["range"] is None else [f"{x:.5g}" for x in entry["range"]]
            table.add_row(year, str(about["hours"]), str(about["gaps"][variables.GROUP_OF[name]]), name,
                          f"{100 * entry['missing']:.3f}", *ends)  # fmt: skip
    console.print(table)


def wind_scan_command(argv: list[str]) -> None:
    """compute the wind-scan cache of a store: order tables and the sector of every region and hour"""
    if argv and argv[0] in SCAN_ACTIONS:
        return SCAN_ACTIONS[argv[0]](argv[1:])
    parser = _parser("wind-scan", wind_scan_command, "python -m data wind-scan datasets/demo.zarr --regions 8 16\n"
                     "  python -m data wind-scan import-pickle old.pkl --store datasets/china.zarr --out old.wind_scan\n"
                     "  python -m data wind-scan compare old.pkl datasets/china.wind_scan")  # fmt: skip
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, help="cache directory (default: STORE with the ending .wind_scan)")
    parser.add_argument("--patch", type=int, default=2, help="pixels a side of a patch (default 2)")
    parser.add_argument("--regions", type=int, nargs=2, default=[32, 32], metavar=("ROWS", "COLS"))
    parser.add_argument("--sectors", type=int, default=16)
    a = parser.parse_args(argv)
    out = a.out or a.store.with_suffix(".wind_scan")
    cache = wind_scan.build(open_store(a.store), out, patch=a.patch, regions=tuple(a.regions), sectors=a.sectors)
    unknown = int((~(cache.usable("global") & cache.usable("regional"))).sum())
    console.print(f"wrote {out}: orders {cache.orders_hash[:12]}, {cache.hours} hours, {unknown} without wind")


def import_pickle_command(argv: list[str]) -> None:
    """read a wind cache of the old code, say whether its orders equal ours, and turn it into one of ours"""
    example = "python -m data wind-scan import-pickle old.pkl --store datasets/china.zarr --out old.wind_scan"
    parser = _parser("wind-scan import-pickle", import_pickle_command, example)
    parser.add_argument("file", type=Path)
    parser.add_argument("--store", type=Path, help="compare with our orders on this store's ground distances (default: the old "
                                                   "code's own units)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="write a cache for --store with the imported orders")
    a = parser.parse_args(argv)
    if a.out and not a.store:
        raise DataError("--out needs --store: a cache holds the wind sectors of one dataset.")
    tables = legacy_scan.read_tables(a.file)
    geometry = tables.geometry
    if a.store:
        geometry = wind_scan.geometry_of(open_store(a.store), geometry.patch, geometry.regions, geometry.sectors)
        if geometry.grid != tables.geometry.grid:
            raise DataError(f"{a.file} is for {tables.geometry.grid[0]} x {tables.geometry.grid[1]} pixels, {a.store} has "
                            f"{geometry.grid[0]} x {geometry.grid[1]}.")  # fmt: skip
    _show_differences(tables, legacy_scan.ours(tables, geometry.aspect))
    if a.out:
        orders = {"global_orders": tables.global_orders, "regional_orders": legacy_scan.one_regional_table(tables)}
        cache = wind_scan.build(open_store(a.store), a.out, patch=geometry.patch, regions=geometry.regions,
                                sectors=geometry.sectors, orders=orders)  # fmt: skip
        console.print(f"wrote {a.out}: orders {cache.orders_hash[:12]}")


def compare_scans_command(argv: list[str]) -> None:
    """count the orders and tokens in which two wind caches differ, sector by sector"""
    parser = _parser("wind-scan compare", compare_scans_command,
                     "python -m data wind-scan compare old.pkl datasets/china.wind_scan")  # fmt: skip
    parser.add_argument("a", type=Path, metavar="A", help="one of our caches, or a pickle of the old code")
    parser.add_argument("b", type=Path, metavar="B")
    a = parser.parse_args(argv)
    _show_differences(legacy_scan.read_tables(a.a), legacy_scan.read_tables(a.b))


def _show_differences(a: legacy_scan.OrderTables, b: legacy_scan.OrderTables) -> None:
    differences = a.differences(b)
    sectors, tokens = a.global_orders.shape
    table = Table("sector", "degrees", f"global, of {tokens} tokens", "regional tokens", title=f"{a.source} against {b.source}")
    for sector, (globally, regional) in enumerate(differences):
        table.add_row(str(sector), f"{360 * sector / sectors:g}", str(globally), str(regional))
    console.print(table)
    counts = [sum(d[i] > 0 for d in differences) for i in (0, 1)]
    console.print("orders are equal" if not any(counts) else
                  f"orders differ in {counts[0]} (global) and {counts[1]} (regional) of {sectors} sectors")  # fmt: skip


def inspect_command(argv: list[str]) -> None:
    """print what a store holds: grid, time, splits, statistics, missing shares, provenance, fingerprint"""
    parser = _parser("inspect", inspect_command, "python -m data inspect datasets/demo.zarr")
    parser.add_argument("store", type=Path)
    store = open_store(parser.parse_args(argv).store)
    about = Table("property", Column("value", overflow="fold"), title=str(store.path))
    size = sum(f.stat().st_size for f in store.path.rglob("*") if f.is_file())
    files = sum(f.is_file() for f in store.path.rglob("*"))
    about.add_row("grid", f"{store.grid[0]} x {store.grid[1]}, latitude {store.lat[0]:.3f} .. {store.lat[-1]:.3f}, "
                          f"longitude {store.lon[0]:.3f} .. {store.lon[-1]:.3f}")  # fmt: skip
    about.add_row("time", f"{store.times[0]} .. {store.times[-1]}, {len(store.times)} hours")
    for name, (a, b) in store.splits.items():
        about.add_row(f"split {name}", f"{store.times[a]} .. {store.times[b - 1]}, {b - a} hours")
    about.add_row("size", f"{size / 1e6:.1f} MB in {files} files, {store.shard_hours} hours a shard")
    for key, value in store.provenance.items():
        about.add_row(key, str(value))
    about.add_row("fingerprint", store.fingerprint)
    console.print(about)
    table = Table("variable", "units", "mean", "std", "min", "max", "missing %", title="statistics of the training split")
    missing = {n: float(m) for g in DYNAMIC_GROUPS for n, m in zip(variables.names(g), store.missing[g].mean(0), strict=True)}
    for name, s in store.statistics.items():
        table.add_row(name, variables.BY_NAME[name].units, *(f"{s[k]:.5g}" for k in ("mean", "std", "min", "max")),
                      f"{100 * missing.get(name, 0.0):.3f}")  # fmt: skip
    console.print(table)
    _show_years(store)


def verify_command(argv: list[str]) -> None:
    """check every shard of a store against its recorded hash"""
    parser = _parser("verify", verify_command, "python -m data verify datasets/demo.zarr")
    parser.add_argument("store", type=Path)
    store = open_store(parser.parse_args(argv).store)
    wrong = verify(store)
    if wrong:
        raise DataError(f"{store.path} is damaged:\n" + "\n".join(f"  {line}" for line in wrong))
    console.print(f"{store.path}: every shard is what was written, fingerprint {store.fingerprint[:12]}")


def benchmark_command(argv: list[str]) -> None:
    """measure how fast a store is read here, and how many GPUs that feeds"""
    parser = _parser("benchmark", benchmark_command, "python -m data benchmark datasets/china.zarr --gpu-samples 20")
    parser.add_argument("store", type=Path)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lead-hours", type=int, default=24)
    parser.add_argument("--gpu-samples", type=float, default=20.0, help="samples/s that one GPU trains (default 20)")
    a = parser.parse_args(argv)
    speeds = benchmark.measure(open_store(a.store), a.samples, a.batch, a.lead_hours)
    table = Table("read", "samples/s", "MB/s", "CPU ms/sample", f"GPUs fed at {a.gpu_samples:g} samples/s",
                  title=f"{a.store}: one thread, {a.samples} samples at random")  # fmt: skip
    for speed in speeds:
        table.add_row(speed.what, f"{speed.samples_per_s:.0f}", f"{speed.megabytes_per_s:.0f}",
                      f"{speed.cpu_ms_per_sample:.3f}", f"{speed.samples_per_s / a.gpu_samples:.1f}")  # fmt: skip
    console.print(table)


SCAN_ACTIONS: dict[str, Callable[[list[str]], None]] = {
    "import-pickle": import_pickle_command,
    "compare": compare_scans_command,
}
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "prepare": prepare_command,
    "synthesize": synthesize_command,
    "wind-scan": wind_scan_command,
    "inspect": inspect_command,
    "verify": verify_command,
    "benchmark": benchmark_command,
}


def _parser(name: str, command: Callable[[list[str]], None], example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m data {name}", description=command.__doc__, epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def main(argv: list[str]) -> int:
    listing = "\n".join(f"  {name:12s} {command.__doc__}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m data", description="Build, describe and check what is read.",
        epilog=f"commands:\n{listing}\n\nexample:\n  python -m data synthesize datasets/demo.zarr",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    try:
        COMMANDS[options.command](options.arguments)
    except (DataError, OSError) as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
