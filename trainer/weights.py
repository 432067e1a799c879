"""`python -m trainer import` and `python -m trainer checkpoint`: weights in, weights out, and what a run has kept."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import save_file

from data.variables import BY_NAME
from trainer.checkpoint import store
from trainer.checkpoint.manifest import CheckpointError
from trainer.checkpoint.pretrained import RECORD, REPORT, recorded_beside, sha256_of, write_report
from trainer.command import run_command
from trainer.config import load
from trainer.inputs import architecture
from trainer.model.topoflow import TopoFlow
from trainer.trained import import_weights

LIGHTNING_PREFIX = "model.climax."


def import_main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer import",
        description="Convert foreign weights, completely or not at all, to a directory that init_from reads.",
        epilog="example:\n  python -m trainer import --from old.ckpt --to weights/published \\\n"
        "      --config launch/configs/china_128x256.yaml --allow-missing elevation_alpha",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--from", dest="source", type=Path, required=True,
                        help="Lightning .ckpt, state dict, safetensors, DeepSpeed or our checkpoint directory")  # fmt: skip
    parser.add_argument("--to", type=Path, required=True, help="directory to write")
    parser.add_argument("--config", type=Path, required=True, help="run whose model section describes the network")
    parser.add_argument("--allow-missing", action="append", default=[], metavar="NAME", help="repeatable")
    parser.add_argument("overrides", nargs="*", metavar="key=value")

    def command(options: argparse.Namespace) -> None:
        console = Console(width=max(110, Console().width))
        run = load(options.config, options.overrides)
        torch.manual_seed(run.seed)
        model = TopoFlow(architecture(run))
        tensors, report = import_weights(model, options.source, options.allow_missing)
        report.show(console)
        report.refuse_unless_complete()
        recorded = recorded_beside(options.source)
        options.to.mkdir(parents=True, exist_ok=True)
        content = {name: t.contiguous() for name, t in tensors.items()}
        written = _write_whole(options.to / "weights.safetensors", lambda file: save_file(content, file))
        write_report(report, options.to / REPORT, sha256=sha256_of(written))
        if recorded is not None:
            (options.to / RECORD).write_text(json.dumps(recorded, indent=1))
        console.print(f"wrote {options.to}: start from it with init_from.path={options.to}")

    return run_command(argv, parser, command)


def _write_whole(path: Path, write: Callable[[Path], None]) -> Path:
    """Under its own name only once it is whole.

    Raises:
        CheckpointError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        return partial.rename(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # what the writers raise on a full disk
        raise CheckpointError(f"{path} could not be written ({error}).") from error
    finally:
        partial.unlink(missing_ok=True)


def checkpoint_main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer checkpoint", description="List, verify, show or export checkpoints.",
        epilog="examples:\n  python -m trainer checkpoint list runs/demo\n"
        "  python -m trainer checkpoint verify runs/demo/checkpoints/latest\n"
        "  python -m trainer checkpoint export runs/demo/checkpoints/latest --to model.safetensors\n"
        "  python -m trainer checkpoint export runs/demo/checkpoints/latest --to old_names.ckpt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("path", type=Path, help="run directory (list), or one checkpoint")
    parser.add_argument("--to", type=Path, help="file to export to: .safetensors (with a .json beside it) or Lightning's .ckpt")
    return run_command(argv, parser, lambda options: ACTIONS[options.action](options))


def _list(options: argparse.Namespace) -> None:
    table = Table("checkpoint", "step", "validation loss", "ranks", "ZeRO", "GB", "")
    found = store.look(options.path)
    if not found:
        raise CheckpointError(f"no checkpoint in {options.path}.")
    manifests = {f.path: f.manifest for f in found if f.manifest is not None}
    best = store.best_of(manifests)
    for f in found:
        try:
            m = store.manifest(f.path)
        except CheckpointError as error:
            table.add_row(f.path.name, str(f.step), "", "", "", "", f"damaged: {error}")
            continue
        loss = "-" if m.own_val_loss is None else f"{m.own_val_loss:.4f}"
        size = sum(record.bytes for record in m.files.values()) / 1e9
        note = "best" if f.path == best else ""
        table.add_row(f.path.name, str(m.step), loss, str(m.world_size), str(m.zero_stage), f"{size:.3f}", note)
    Console().print(table)


def _verify(options: argparse.Namespace) -> None:
    problems = store.verify(options.path)
    if problems:
        raise CheckpointError(f"{options.path} is damaged:\n" + "\n".join(f"  {p}" for p in problems))
    print(f"{options.path}: {len(store.manifest(options.path).files)} files have their recorded hashes")


def _show(options: argparse.Namespace) -> None:
    Console().print_json(data=store.manifest(options.path).model_dump(exclude={"files", "tensors"}))


def _export(options: argparse.Namespace) -> None:
    """One file that loads without DeepSpeed or this project."""
    if options.to is None or options.to.suffix not in (".safetensors", ".ckpt"):
        raise CheckpointError("export needs --to FILE.safetensors or --to FILE.ckpt.")
    m = store.manifest(options.path)
    if store.verify(options.path):
        raise CheckpointError(f"{options.path} is damaged: look at it with `python -m trainer checkpoint verify`.")
    # No network is built: the shape () of published scalars is the only difference to what the engine holds.
    state = {k: v.reshape(()) if k.endswith("elevation_alpha") else v for k, v in store.load_weights(options.path).items()}
    if options.to.suffix == ".ckpt":
        lightning = {"state_dict": {LIGHTNING_PREFIX + k: v for k, v in state.items()}, "epoch": 0, "global_step": m.step,
                     "hyper_parameters": m.config}  # fmt: skip
        _write_whole(options.to, lambda file: torch.save(lightning, file))
    else:
        about = {"step": m.step, "config": m.config, "statistics": m.statistics, "fingerprints": m.fingerprints,
                 "val_loss": m.progress.val_loss, "val_step": m.progress.val_step,
                 "best_val_loss": m.progress.best_val_loss,
                 "units": {name: BY_NAME[name].units for name in m.statistics if name in BY_NAME}}  # fmt: skip
        _write_whole(options.to, lambda file: save_file(state, file))
        options.to.with_suffix(".json").write_text(json.dumps(about, indent=1))
    print(f"wrote {options.to}")


ACTIONS = {"list": _list, "verify": _verify, "show": _show, "export": _export}
