"""The physics study: `run` trains and scores what is not yet in results.json, `draw` writes docs/study.md from it.

    python -m benchmarks.physics_study run --work runs/study --workers 2
    python -m benchmarks.physics_study draw

Hours on two cores; interrupted, it goes on. Only trainings that have ended are kept.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.physics_study import oracle, runs
from benchmarks.physics_study.design import BLOCKING, RESULTS, ROOT, VARIANTS, jobs
from benchmarks.physics_study.draw import draw


def study(work: Path, workers: int, variants: list[str]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    regions = work / "regions.geojson"
    runs.write_regions(regions, 32, 64)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"oracle": {}, "runs": []}
    for blocking in BLOCKING:
        runs.make_store(work, blocking)
        if str(blocking) not in results["oracle"]:
            results["oracle"][str(blocking)] = oracle.ceiling(blocking, regions)
            _keep(results)
    done = {(row["blocking"], row["variant"], row["seed"]) for row in results["runs"]}
    left = [job for job in jobs() if (job.blocking, job.variant, job.seed) not in done and job.variant in variants]
    console = Console(stderr=True)
    console.print(f"{len(done)} trainings are in {RESULTS.name}, {len(left)} are to be done, {workers} at a time")
    with ThreadPoolExecutor(workers) as pool:
        started = {pool.submit(runs.train_and_score, work, job): job for job in left}
        for number, future in enumerate(as_completed(started), 1):
            if future.exception() is not None:  # what has begun ends and is trained again next time, the rest does not begin
                pool.shutdown(wait=False, cancel_futures=True)
            results["runs"].append(future.result())
            results["runs"].sort(key=lambda row: (row["variant"], row["blocking"], row["seed"]))
            _keep(results)
            console.print(f"{number} of {len(left)}: {started[future].name}, test loss {future.result()['loss']:.4f}")


def _keep(results: dict[str, Any]) -> None:
    lines = ",\n".join(json.dumps(row) for row in results["runs"])
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(f'{{"oracle": {json.dumps(results["oracle"])},\n"runs": [\n{lines}\n]}}\n')
    partial.replace(RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "draw"])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "study", help="where stores and runs are kept meanwhile")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time, one core each")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="only these")
    options = parser.parse_args()
    if options.action == "run":
        study(options.work.absolute(), options.workers, options.variants)
    draw()


if __name__ == "__main__":
    main()
