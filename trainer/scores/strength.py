"""What the path of elevation_alpha says of the elevation bias: does it do what it is called?

Above 0 it charges what it is named after; below 0 it rewards it, which is no barrier; within its own fluctuations it is
nothing. docs/study.md has what it came to there, and what it was worth.
"""

from __future__ import annotations

import json
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

ENOUGH_STEPS = 600  # as long as the trainings of the study, by whose end the sign was settled or never would be


def judged(training: list[dict[str, Any]]) -> str:
    """A warning for rows of metrics.jsonl, over the last half of the steps that they have; empty where there is none."""
    path = [(row["step"], row["elevation_alpha"]) for row in training if "elevation_alpha" in row]
    if not path or path[-1][0] < ENOUGH_STEPS:
        return ""
    recent = [alpha for step, alpha in path if step >= path[-1][0] / 2]
    if len(recent) < 4:
        return ""
    middle, spread = statistics.fmean(recent), statistics.stdev(recent)
    if abs(middle) <= 2 * spread:
        around = f"{middle:+.3f} +- {spread:.3f}"
        return f"WARNING: within its own fluctuations ({around}): the elevation bias does nothing, see docs/study.md"
    if middle < 0:
        return "WARNING: below 0, it rewards what it should charge: try the other model.elevation_bias, see docs/study.md"
    return ""


def judged_in(run_dir: Path) -> str:
    """The same of all that a run has logged; a line that a kill has cut short is left out."""
    path, rows = run_dir / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return judged([row for row in rows if row["kind"] == "train"])
