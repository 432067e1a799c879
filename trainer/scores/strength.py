"""What the path of elevation_alpha says of the elevation bias: does it do what it is called?

Above 0 it charges what it is named after; below 0 it rewards it, which is no barrier; near 0 it does little.
docs/study.md has what it came to there, and what it was worth.
"""

from __future__ import annotations

import json
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

ENOUGH_STEPS = 600  # as long as the trainings of the study
NOISE = 0.8  # per km: two standard deviations of alpha between trainings that differ in their seed alone, there


def judged(training: list[dict[str, Any]]) -> str:
    """A warning for rows of metrics.jsonl, of the last tenth of the steps that they have; empty where there is none."""
    path = [(row["step"], row["elevation_alpha"]) for row in training if "elevation_alpha" in row]
    if not path or path[-1][0] < ENOUGH_STEPS:
        return ""
    end = statistics.fmean(alpha for step, alpha in path if step >= 0.9 * path[-1][0])
    if abs(end) <= NOISE:
        return f"WARNING: within {NOISE} of 0, as far as seeds alone make it: the elevation bias does little, see docs/study.md"
    if end < 0:
        return "WARNING: below 0, it rewards what it should charge: is model.elevation_bias the one you mean? See docs/study.md"
    return ""


def judged_in(run_dir: Path) -> str:
    """The same of all that a run has logged; a line that a kill has cut short is left out."""
    path, rows = run_dir / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return judged([row for row in rows if row["kind"] == "train"])
