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
SEEDS, MORE_SEEDS = (1, 2, 3), (4, 5)
STORE = ["--start", "2015-04-01", "--days", "180", "--grid", "32", "64", "--train", "0.6", "--validation", "0.1"]
TEST_SAMPLES = 1200
SCAN = ["wind_scan.mode=regional", "wind_scan.cache={scan}"]
VARIANTS = {
    "none": [],
    "descent": ["model.elevation_bias=descent"],
    "climb": ["model.elevation_bias=climb"],
    "scan": SCAN,
    "relative": ["model.relative_position=true"],
    "between": ["model.elevation_bias=climb"],
    "locality": [],
    "advection": [],
    "scan and climb": [*SCAN, "model.elevation_bias=climb"],
}
ALTERNATIVES = ("between", "locality", "advection")  # alternatives.py: only here, and only where there are barriers
MATTER = ("none", "descent", "climb")  # those with more seeds


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
    """All of them, so ordered that what an interrupted study has is balanced."""
    first = [
        Job(k, variant, seed)
        for seed in SEEDS
        for variant in VARIANTS
        for k in BLOCKING
        if k or variant not in (*ALTERNATIVES, "scan and climb")
    ]
    return first + [Job(k, variant, seed) for seed in MORE_SEEDS for variant in MATTER for k in BLOCKING]
