"""Evaluations as files, and which of them may be compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.checkpoint.manifest import CheckpointError, read_json

if TYPE_CHECKING:
    from trainer.dataset import Dataset

COMPARABLE = ("split", "samples", "period", "baseline", "weather")


def identity_of(dataset: Dataset) -> dict[str, Any]:
    """What an evaluation states of the data, the scan and the splits that it was made with."""
    store = dataset.store
    return {"fingerprints": dataset.fingerprints(), "lineage": [*store.earlier, store.fingerprint]}


def other_identity(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """In which fingerprints two statements differ; later hours of the same data are no difference."""
    ours, theirs = a["fingerprints"], b["fingerprints"]
    differing = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    continued = ours.get("data") in b.get("lineage", ()) or theirs.get("data") in a.get("lineage", ())
    return [name for name in differing if not (name == "data" and continued)]


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
        pairs = {key: (result[key], results[0][key]) for key in COMPARABLE if result[key] != results[0][key]}
        for name in other_identity(result, results[0]):
            pairs[name] = (result["fingerprints"].get(name), results[0]["fingerprints"].get(name))
        if pairs:
            listed = "; ".join(f"{key} {ours}, not {theirs}" for key, (ours, theirs) in pairs.items())
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
        whole = all(key in tree for key in ("fingerprints", *COMPARABLE)) and all(
            isinstance(x, int | float | None) for x in numbers
        )
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path} is not what `python -m trainer evaluate` writes: evaluate the run again.")
    evaluation: dict[str, Any] = tree
    return evaluation
