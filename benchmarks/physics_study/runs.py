"""Stores, trainings and evaluations of the study, by the product's own commands; what was done is not done again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from scipy.ndimage import maximum_filter

from benchmarks.physics_study.design import ALTERNATIVES, HERE, LEADS, ROOT, STORE, TEST_SAMPLES, VARIANTS, Job
from data.synthetic.synthesize import load_static

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "RANKS": "1", "PYTHONPATH": str(ROOT)}


def store_of(work: Path, blocking: int) -> Path:
    return work / f"k{blocking}.zarr"


def scan_of(work: Path, blocking: int) -> Path:
    return work / f"k{blocking}.wind_scan"


def paths_of(work: Path, blocking: int) -> Path:
    return work / f"k{blocking}.wind_paths"


def make_store(work: Path, blocking: int) -> None:
    """The reanalysis with this blocking, its wind-scan cache and its paths of the air."""
    store, scan = store_of(work, blocking), scan_of(work, blocking)
    if not scan.exists():
        shutil.rmtree(store, ignore_errors=True)
        _call(work / "stores.log", "data", "synthesize", store, *STORE, "--blocking", blocking)
        _call(work / "stores.log", "data", "wind-scan", store, "--out", scan, "--regions", 8, 16)
    if not paths_of(work, blocking).exists():
        _call(work / "stores.log", "data", "wind-paths", store, "--out", paths_of(work, blocking), "--workers", 2)


def write_regions(path: Path, rows: int, cols: int) -> None:
    """GeoJSON of plains, slopes and plateau, and of what lies below a barrier: ground at least 1 km higher within two cells."""
    lat, lon, static = load_static(rows, cols)
    height = static["elevation"]
    parts = {
        "plains": height < 500.0,
        "slopes": (height >= 500.0) & (height <= 2500.0),
        "plateau": height > 2500.0,
        "lee": (height < 1500.0) & (maximum_filter(height, size=5) - height >= 1000.0),
    }
    half = abs(lat[0] - lat[1]) / 2, abs(lon[1] - lon[0]) / 2
    features = []
    for name, inside in parts.items():
        cells = [
            shapely.box(lon[c] - half[1], lat[r] - half[0], lon[c] + half[1], lat[r] + half[0])
            for r, c in np.argwhere(inside).tolist()
        ]
        geometry = json.loads(shapely.to_geojson(shapely.union_all(cells)))
        features.append({"type": "Feature", "properties": {"name": name}, "geometry": geometry})
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def train_and_score(work: Path, job: Job) -> dict[str, Any]:
    """Train, evaluate and keep what the study shows of it; the run itself is removed."""
    run, log = work / job.name, work / f"{job.name}.log"
    caches = {"scan": scan_of(work, job.blocking), "paths": paths_of(work, job.blocking)}
    keys = [key.format(**caches) for key in VARIANTS[job.variant]]
    keys += [f"run_dir={run}", f"data.store={store_of(work, job.blocking)}", f"seed={job.seed}"]
    alternative = job.variant in ALTERNATIVES
    program = ("benchmarks.physics_study.alternatives", job.variant.removeprefix("long ")) if alternative else ("trainer",)
    _call(log, *program, "train", "--config", HERE / "study.yaml", *keys)
    _call(log, *program, "evaluate", run, "--samples", TEST_SAMPLES, "--regions", work / "regions.geojson")
    scores = json.loads((run / "evaluation-test.json").read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in metrics if row["kind"] == "train"]
    regions = {"domain": scores["scores"]} | {name: region["scores"] for name, region in scores["regions"].items()}
    kept = {
        "blocking": job.blocking,
        "variant": job.variant,
        "seed": job.seed,
        "loss": scores["loss"],
        "seconds_a_step": float(np.median([8 / row["samples_per_s"] for row in trained])),
        "alpha": [[row["step"], round(row["elevation_alpha"], 5)] for row in trained if "elevation_alpha" in row],
        "rmse": {name: _numbers(region, "rmse") for name, region in regions.items()},
        "climatology_rmse": {name: _numbers(region, "climatology_rmse") for name, region in regions.items()},
        "persistence_rmse": {name: _numbers(region, "persistence_rmse") for name, region in regions.items()},
    }
    shutil.rmtree(run)
    return kept


def _numbers(scores: dict[str, Any], what: str) -> dict[str, list[float]]:
    """Lead time -> a number for each pollutant."""
    return {str(lead): [float(f"{cell[f'{lead}h'][what]:.6g}") for cell in scores.values()] for lead in LEADS}


def _call(log: Path, *command: object) -> None:
    _run(log, [sys.executable, "-m", *command])


def _run(log: Path, command: list[object]) -> None:
    with log.open("a") as file:
        done = subprocess.run([str(part) for part in command], cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with code {done.returncode}: see {log}")
