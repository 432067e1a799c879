"""Evaluations as files, and which of them may be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.checkpoint.manifest import CheckpointError, read_json

COMPARABLE = ("fingerprints", "split", "samples", "period", "baseline", "weather")


def read_comparable(paths: list[Path]) -> list[dict[str, Any]]:
    """Several evaluations of the same data, scan, split and samples.

    Raises:
        CheckpointError: one is no evaluation, or not of the same as the first.
    """
    results = [read_evaluation(path) for path in paths]
    for path, result in zip(paths[1:], results[1:], strict=True):
        rows, first = ({(name, lead) for name, leads in r["scores"].items() for lead in leads} for r in (result, results[0]))
        if rows != first:
            raise CheckpointError(f"{path} cannot be compared with {paths[0]}: only one has {sorted(rows ^ first)[:4]}.")
        differing = [key for key in COMPARABLE if result[key] != results[0][key]]
        if differing:
            listed = "; ".join(f"{key} {result[key]}, not {results[0][key]}" for key in differing)
            raise CheckpointError(
                f"{path} cannot be compared with {paths[0]}: {listed}. Evaluate both on the same store, scan, split and "
                "samples."
            )
    return results


def read_evaluation(path: Path) -> dict[str, Any]:
    """What `python -m trainer evaluate` has written.

    Raises:
        CheckpointError: it is something else.
    """
    tree = read_json(path)
    try:
        numbers = [score[key] for leads in tree["scores"].values() for score in leads.values() for key in ("rmse", "skill")]
        whole = all(key in tree for key in COMPARABLE) and all(isinstance(x, int | float | None) for x in numbers)
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path} is not what `python -m trainer evaluate` writes: evaluate the run again.")
    evaluation: dict[str, Any] = tree
    return evaluation
