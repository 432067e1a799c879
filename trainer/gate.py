"""Is the starting loss the one that was promised? The step-0 gate, and `python -m trainer which-cache`.

Both score the same fixed validation samples. When the gate refuses, it scores them again without the bias and in the
other scan modes, and compares what was recorded beside the weights, so that the message names the cause that fits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trainer.checkpoint.manifest import CheckpointError, read_json
from trainer.checkpoint.pretrained import recorded_beside
from trainer.command import run_command
from trainer.config import load
from trainer.inputs import Inputs, architecture, open_inputs
from trainer.metrics import normalised_loss, score_evenly
from trainer.model.topoflow import TopoFlow
from trainer.runtime import World
from trainer.trained import import_weights


def require_expected(engine: Any, inputs: Inputs, val_loss: float, world: World) -> None:
    """Compare the validation loss before step 1 with `expect`; collective.

    Raises:
        CheckpointError: on every rank, outside the tolerance; says which of the usual causes fits.
    """
    expect = inputs.run.expect
    if expect is None or abs(val_loss - expect.val_loss) <= expect.tolerance:
        return
    engine.eval()
    findings = _from_other_inputs(engine, inputs, val_loss, world)
    if world.is_main:  # what it wrote may not be visible to others yet
        findings = [*_from_the_weights(inputs), *findings]
    listed = "\n".join(f"  - {finding}" for finding in findings)
    raise CheckpointError(
        f"step-0 validation loss is {val_loss:.4f}, expected {expect.val_loss} +- {expect.tolerance}; nothing was trained. "
        f"The usual causes, and what was found:\n{listed}"
    )


def _from_the_weights(inputs: Inputs) -> list[str]:
    """What the file that the weights came from, and the notes beside it, say."""
    run = inputs.run
    if run.init_from is None:
        return ["weights not loaded: init_from is not set, so the network starts from random numbers. THIS FITS"]
    share = read_json(run.run_dir / "import.json")["share_loaded"]
    findings = [f"weights not loaded: {100 * share:.2f} % of the parameters came from {run.init_from.path}"]
    recorded = recorded_beside(run.init_from.path)
    if recorded is None:
        return [*findings, "other statistics, another wind-scan cache: the file records neither, so neither can be excluded"]
    ours = inputs.store.statistics
    differing = [name for name, numbers in recorded["statistics"].items() if name in ours
                 and any(abs(numbers[k] - ours[name][k]) > 1e-6 * numbers["std"] for k in ("mean", "std"))]  # fmt: skip
    findings.append(f"other statistics: {f'{differing} differ. THIS FITS' if differing else 'they are the same'}")
    cache, now = recorded["fingerprints"]["wind_scan_orders"], inputs.fingerprints()["wind_scan_orders"]
    changed = f"orders {cache[:12]} then, {now[:12]} now. THIS FITS"
    findings.append(f"another wind-scan cache: {changed if cache != now else 'the orders are the same'}")
    return findings


def _from_other_inputs(engine: Callable[..., Tensor], inputs: Inputs, val_loss: float, world: World) -> list[str]:
    """What the loss is without the bias and with other scans; collective."""
    run, expect, findings = inputs.run, inputs.run.expect, []
    assert expect is not None
    variants = {}
    if run.wind_scan.mode != "legacy":
        if run.model.elevation_bias:
            variants["without the elevation bias"] = replace(inputs, elevation=torch.zeros_like(inputs.elevation))
        modes = ("none", "global", "regional") if inputs.scan is not None else ()
        for mode in modes:
            if mode != run.wind_scan.mode:
                other = run.model_copy(update={"wind_scan": run.wind_scan.model_copy(update={"mode": mode})})
                variants[f"with wind_scan.mode {mode}"] = replace(inputs, run=other)
    for name, variant in variants.items():
        stream = variant.stream(variant.index("validation"))
        loss = normalised_loss(score_evenly(engine, stream, variant, world.size, world.rank), inputs.normalizer)
        finding = f"{name} the loss is {loss:.4f}"
        if abs(loss - expect.val_loss) <= expect.tolerance:
            finding += ". THIS FITS: the weights were trained so"
        elif abs(loss - val_loss) < 1e-6 * abs(val_loss):
            finding += ": it cannot act"
        findings.append(finding)
    return findings


def main(argv: list[str]) -> int:
    """Score fixed validation samples with each wind-scan cache and name the one that reproduces the recorded loss."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer which-cache", description=main.__doc__,
        epilog="example:\n  python -m trainer which-cache --checkpoint weights/published --config CONFIG \\\n"
        "      --caches datasets/old.wind_scan datasets/china.wind_scan --val-loss 0.3557",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights of any format that import reads")
    parser.add_argument("--caches", type=Path, nargs="+", required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--val-loss", type=float, help="the loss to reproduce (default: the one recorded with the checkpoint)")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--allow-missing", action="append", default=[], metavar="NAME")
    return run_command(argv, parser, _which_cache)


@torch.no_grad()
def _which_cache(options: argparse.Namespace) -> None:
    recorded = recorded_beside(options.checkpoint)
    wanted = options.val_loss if recorded is None or options.val_loss is not None else recorded["val_loss"]
    if wanted is None:
        raise CheckpointError(f"{options.checkpoint} records no validation loss: give the one to reproduce with --val-loss.")
    losses: dict[Path, float] = {}
    table = Table("cache", "orders", "validation loss", "difference", title=f"recorded: {wanted:.6f}")
    model: TopoFlow | None = None
    for cache in options.caches:
        run = load(options.config, [f"wind_scan.cache={cache}"])
        if model is None:
            model = TopoFlow(architecture(run))
            tensors, report = import_weights(model, options.checkpoint, options.allow_missing)
            report.refuse_unless_complete()
            model.load_state_dict({**model.state_dict(), **tensors})
            model.eval()
        inputs = open_inputs(run, torch.device("cpu"))
        sums = score_evenly(model, inputs.stream(inputs.index("validation")), inputs)
        losses[cache] = normalised_loss(sums, inputs.normalizer)
        table.add_row(str(cache), inputs.fingerprints()["wind_scan_orders"][:12], f"{losses[cache]:.6f}",
                      f"{losses[cache] - wanted:+.6f}")  # fmt: skip
    Console(width=max(110, Console().width)).print(table)
    best = min(losses, key=lambda cache: abs(losses[cache] - wanted))
    if not abs(losses[best] - wanted) <= options.tolerance:
        raise CheckpointError(
            f"none of these caches reproduces {wanted:.6f} within {options.tolerance}; the nearest is {best}."
        )
    print(f"{best} reproduces the recorded loss")
