"""What is compared with what: strengths of the barriers, features of the network, seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
BLOCKING = (0, 2, 8)  # per km of climb
LEADS = (12, 24, 48)
REGIONS = ("domain", "plains", "slopes", "lee", "plateau")
STORE = ["--start", "2015-04-01", "--days", "180", "--grid", "32", "64", "--train", "0.6", "--validation", "0.1"]
TEST_SAMPLES = 1200
SCAN = ["wind_scan.mode=regional", "wind_scan.cache={scan}"]
PATHS = ["wind_paths.cache={paths}"]
CARRIED, EXPOSED = "data.derived=[sun,day,carried]", "data.derived=[sun,day,carried,exposure]"
SOURCES = "model.sources=[one,wind,dust,night]"
LONG = ["steps=3000", "checkpoint.every=3000", "telemetry.every=100"]
VARIANTS = {
    "none": [],
    "descent": ["model.elevation_bias=descent"],
    "climb": ["model.elevation_bias=climb"],
    "scan": SCAN,
    "scan added": [*SCAN, "wind_scan.positions=add"],
    "scan and climb": [*SCAN, "model.elevation_bias=climb"],
    "carried": [*PATHS, CARRIED],
    "carried and exposure": [*PATHS, EXPOSED],
    "sources": [*PATHS, EXPOSED, SOURCES],
    "sources alone": [*PATHS, SOURCES],
    "relative": ["model.relative_position=true"],
    "between": ["model.elevation_bias=climb"],
    "locality": [],
    "advection": [],
    "deaf": [],
    "long none": LONG,
    "long climb": [*LONG, "model.elevation_bias=climb"],
    "long scan": [*LONG, *SCAN],
    "long deaf": LONG,
}
ALTERNATIVES = ("between", "locality", "advection", "deaf", "long deaf")  # alternatives.py: only here
AIR = ("sources", "carried and exposure", "carried", "sources alone")  # what is made of the paths of the air
MATTER = ("none", "descent", "climb", "scan")  # on every reanalysis, with several seeds


@dataclass(frozen=True)
class Job:
    """One training."""

    blocking: int
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"k{self.blocking}-{self.variant.replace(' ', '-')}-{self.seed}"


def jobs() -> list[Job]:
    """All of them, so ordered that an interrupted study says most: one seed of everything, then more of what matters."""
    air = [Job(k, variant, seed=1) for variant in AIR for k in (2, 8, 0)]
    air += [Job(k, variant, seed) for seed in (2, 3, 4, 5) for variant in AIR for k in (2, 8)]
    first = [
        Job(k, variant, seed=1)
        for variant in VARIANTS
        if variant not in AIR
        for k in BLOCKING
        if (k == 8 or not variant.startswith("long")) and (k or variant not in ("between", "locality", "advection"))
    ]
    more = [Job(k, variant, seed) for seed in (2, 3) for barriers in ((8, 2), (0,)) for variant in MATTER for k in barriers]
    others = [Job(k, variant, seed) for seed in (2, 3) for variant in ("deaf", "relative", "scan and climb") for k in BLOCKING]
    longer = [Job(8, f"long {variant}", seed) for seed in (2, 3) for variant in ("none", "deaf", "climb", "scan")]
    return [
        *air,
        *first,
        *more,
        *others,
        *(Job(k, variant, seed) for seed in (4, 5) for variant in MATTER[:3] for k in BLOCKING),
        *longer,
    ]
