"""`python -m trainer evaluate RUN_DIR`: errors and skill of a checkpoint on held-out days, in physical units."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data.variables import BY_NAME
from trainer.checkpoint.manifest import CheckpointError, read_json
from trainer.command import run_command, run_parser
from trainer.metrics import normalised_loss, score
from trainer.trained import Trained, load_trained


def evaluate(trained: Trained, split: str, samples: int | None) -> dict[str, Any]:
    """Score on `split` ("validation", "test"): all samples, or `samples` spread evenly over it.

    Returns:
        JSON values: identity of checkpoint, data and scan beside {pollutant: {lead: {metric: number}}}.
    """
    index = trained.inputs.index(split)
    numbers = np.arange(len(index)) if samples is None else index.evenly(samples)
    micro = trained.run.batch.micro
    batches = trained.inputs.stream(index).listed(numbers, micro)
    shown = track(batches, "evaluating", total=-(-len(numbers) // micro), console=Console(stderr=True))
    sums = score(trained.model, shown, trained.inputs)
    table = sums.table()
    targets = trained.inputs.normalizer.targets
    return {
        "checkpoint": str(trained.checkpoint), "step": trained.manifest.step,
        "fingerprints": trained.inputs.fingerprints(), "split": split, "samples": len(numbers),
        "period": [str(trained.inputs.store.times[index.t.min()]), str(trained.inputs.store.times[index.t.max()])],
        "loss": normalised_loss(sums, trained.inputs.normalizer), "baseline": "persistence",
        "scores": {
            name: {f"{lead}h": {"units": BY_NAME[name].units, **{k: _number(t[row, column]) for k, t in table.items()}}
                   for column, lead in enumerate(sums.lead_hours)}
            for row, name in enumerate(targets)
        },
    }  # fmt: skip


def show(result: dict[str, Any], console: Console) -> None:
    """Print one row for every pollutant and lead time."""
    title = f"{result['split']} split, {result['samples']} samples, step {result['step']}"
    table = Table("pollutant", "units", "lead", "RMSE", "MAE", "bias", "persistence RMSE", "skill", title=title)
    for name, leads in result["scores"].items():
        for lead, s in leads.items():
            values = ["-" if s[k] is None else f"{s[k]:.2f}" for k in ("rmse", "mae", "bias", "persistence_rmse")]
            skill = "-" if s["skill"] is None else f"{s['skill']:+.3f}"
            style = "green" if (s["skill"] or 0) > 0 else "red"
            table.add_row(name, s["units"], lead, *values, f"[{style}]{skill}[/]")
        table.add_section()
    console.print(table)
    console.print("skill = 1 - MSE / MSE of persistence: 1 is perfect, 0 is as good as assuming nothing changes")


def _number(value: Any) -> float | None:
    return None if math.isnan(float(value)) else float(value)


def main(argv: list[str]) -> int:
    parser = run_parser("evaluate", __doc__, "runs/demo --split test --samples 200")
    parser.add_argument("--split", default="test")
    parser.add_argument("--samples", type=int, help="spread evenly over the split (default: all)")

    def command(options: argparse.Namespace) -> None:
        result = evaluate(load_trained(options.run_dir, options.checkpoint, options.overrides), options.split, options.samples)
        path = options.run_dir / f"evaluation-{options.split}.json"
        path.write_text(json.dumps(result, indent=1))
        console = Console(width=max(110, Console().width))
        show(result, console)
        console.print(f"wrote {path}")

    return run_command(argv, parser, command)


def read_evaluation(path: Path) -> dict[str, Any]:
    """What `evaluate` has written.

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


COMPARABLE = ("fingerprints", "split", "samples", "period", "baseline")


def compare(paths: list[Path], console: Console) -> None:
    """Print skill and RMSE of several evaluations beside each other.

    Raises:
        CheckpointError: they are not of the same data, scan, split and samples.
    """
    results = [read_evaluation(path) for path in paths]
    for path, result in zip(paths[1:], results[1:], strict=True):
        differing = [key for key in COMPARABLE if result[key] != results[0][key]]
        rows, first = ({(name, lead) for name, leads in r["scores"].items() for lead in leads} for r in (result, results[0]))
        if rows != first:
            raise CheckpointError(f"{path} cannot be compared with {paths[0]}: only one has {sorted(rows ^ first)[:4]}.")
        if differing:
            raise CheckpointError(
                f"{path} cannot be compared with {paths[0]}: "
                + "; ".join(f"{key} {result[key]}, not {results[0][key]}" for key in differing)
                + ". Evaluate both on the same store, scan, split and samples."
            )
    table = Table("pollutant", "lead", *(f"{path.parent.name} {what}" for path in paths for what in ("RMSE", "skill")))
    for name, leads in results[0]["scores"].items():
        for lead in leads:
            scores = [result["scores"][name][lead] for result in results]
            table.add_row(name, lead, *("-" if s[k] is None else f"{s[k]:.3f}" for s in scores for k in ("rmse", "skill")))
    console.print(table)


def compare_main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer compare",
        description="Set evaluations beside each other; refuses to mix data, scans or samples.",
        epilog="example:\n  python -m trainer compare runs/a/evaluation-test.json runs/b/evaluation-test.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("evaluations", type=Path, nargs="+", metavar="evaluation.json")
    return run_command(argv, parser, lambda o: compare(o.evaluations, Console(width=max(110, Console().width))))
