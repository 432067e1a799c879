"""List, verify, show or export checkpoints."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from data.command_line import console
from trainer.checkpoint import store
from trainer.checkpoint.manifest import MANIFEST, CheckpointError, sha256_of
from trainer.commands import add_raw

EXAMPLES = """  python -m trainer checkpoint list runs/demo
  python -m trainer checkpoint verify runs/demo/checkpoints/latest
  python -m trainer checkpoint show model.safetensors
  python -m trainer checkpoint export runs/demo/checkpoints/latest --to model.safetensors
  python -m trainer checkpoint export runs/demo/checkpoints/latest --to old_names.ckpt"""
# What Lightning's load_from_checkpoint asks for; 2.5 takes a file without callbacks and loops.
LIGHTNING: dict[str, Any] = {"pytorch-lightning_version": "2.5.0", "callbacks": {}, "loops": {}}
LIGHTNING |= {"optimizer_states": [], "lr_schedulers": []}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["list", "verify", "show", "export"])
    about = "run directory (list, export), one checkpoint, or an export (show)"
    parser.add_argument("path", type=Path, help=about)
    add_raw(parser)
    about = ".safetensors, with what forecasts need beside it, or .ckpt of the old code's Lightning"
    parser.add_argument("--to", type=Path, help=f"file to export to: {about}")


def run(options: argparse.Namespace) -> None:
    path = options.path
    if options.action == "list":
        list_run(path)
    elif options.action == "verify":
        problems = store.verify(path)
        if problems:
            raise CheckpointError(f"{path} is damaged:\n" + "\n".join(f"  {p}" for p in problems))
        print(f"{path}: {len(store.manifest(path).files)} files have their recorded hashes")
    elif options.action == "show":
        console().print_json(data=_described(path))
    else:
        export(path, options.to, options.raw)


def _described(path: Path) -> dict[str, Any]:
    """What a checkpoint, an export or an import says of itself."""
    if (path / MANIFEST).exists():
        return store.manifest(path).model_dump(exclude={"files", "tensors"})

    from trainer.weights.reading import read

    record = read(path).record
    if record is None:
        raise CheckpointError(f"{path} has no record: it is no checkpoint, export or import of ours.")
    return record.model_dump(exclude={"tensors"})


def list_run(run_dir: Path) -> None:
    """Print a line for every checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    from rich.table import Table

    found = store.look(run_dir)
    if not found:
        raise CheckpointError(f"no checkpoint in {run_dir}.")
    best = store.best_of({f.path: f.manifest for f in found if f.manifest is not None})
    table = Table("checkpoint", "step", "validation loss", "ranks", "ZeRO", "GB", "")
    for f in found:
        try:
            m = store.manifest(f.path)
        except CheckpointError as error:
            table.add_row(f.path.name, str(f.step), "", "", "", "", f"damaged: {error}")
            continue
        loss = "-" if m.own_val_loss is None else f"{m.own_val_loss:.4f}"
        size = f"{sum(record.bytes for record in m.files.values()) / 1e9:.3f}"
        note = "best" if f.path == best else ""
        table.add_row(f.path.name, str(m.step), loss, str(m.world_size), str(m.zero_stage), size, note)
    console().print(table)


def export(path: Path, to: Path | None, raw: bool = False) -> None:
    """Write one file that loads without DeepSpeed or this project, with its record in it.

    Args:
        path: a checkpoint, or a run, whose newest whole checkpoint is taken.

    Raises:
        CheckpointError: no file was named, or the checkpoint is damaged.
    """
    if to is None or to.suffix not in (".safetensors", ".ckpt"):
        raise CheckpointError("export needs --to FILE.safetensors or --to FILE.ckpt.")

    import torch

    from trainer.checkpoint.record import KEY, hash_tensors, write_tensors, write_whole
    from trainer.model.compat import foreign_names
    from trainer.weights.reading import read

    weights = read(path, raw)
    if weights.record is None:
        remedy = "bring it along with `python -m trainer import` first"
        raise CheckpointError(f"{path} is no checkpoint of ours: {remedy}.")
    record = weights.record.model_copy(update={"made_from": weights.made_from})
    tensors = weights.tensors
    # The shape () of published scalars is the only difference to what the engine holds.
    tensors |= {name: w.reshape(()) for name, w in tensors.items() if name.endswith("elevation_alpha")}
    if to.suffix == ".safetensors":
        if weights.loaded is not None:
            beside = _beside(weights.loaded.path.resolve().parent.parent, to)
            record = record.model_copy(update={"files": beside})
        write_whole(to, lambda file: write_tensors(file, tensors, record))
        print(f"wrote {to}: the weights {weights.taken}")
        return
    if record.config["model"]["elevation_bias"] == "climb":
        raise CheckpointError(
            "the old code has no model.elevation_bias=climb and would take its alpha for descent: export to .safetensors."
        )
    named = foreign_names(tensors)
    record = record.model_copy(update={"tensors": hash_tensors(named.items())})
    about = {"epoch": 0, "global_step": record.step, KEY: record.model_dump_json()}
    lightning = {"state_dict": named, **about, **LIGHTNING}
    write_whole(to, lambda file: torch.save(lightning, file))
    print(f"wrote {to}: the weights {weights.taken}")


def _beside(run_dir: Path, to: Path) -> dict[str, str]:
    """Copy grid, static fields, scan and climatology, for `load_forecaster` without the run.

    Returns:
        The hash of each, by what its name ends in.
    """
    from data.channels import climatology, surroundings

    copied = {}
    for name in (surroundings.FILE, climatology.FILE):
        target = to.with_suffix(f".{name}")
        target.unlink(missing_ok=True)  # of another export
        if (run_dir / name).exists():
            shutil.copyfile(run_dir / name, target)
            copied[name] = sha256_of(target)
    return copied
