"""List, verify, show or export checkpoints."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from data.command_line import console
from data.variables import BY_NAME
from trainer.checkpoint import store
from trainer.checkpoint.manifest import CheckpointError, Manifest

EXAMPLES = """  python -m trainer checkpoint list runs/demo
  python -m trainer checkpoint verify runs/demo/checkpoints/latest
  python -m trainer checkpoint export runs/demo/checkpoints/latest --to model.safetensors
  python -m trainer checkpoint export runs/demo/checkpoints/latest --to old_names.ckpt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["list", "verify", "show", "export"])
    parser.add_argument("path", type=Path, help="run directory (list), or one checkpoint")
    parser.add_argument(
        "--to",
        type=Path,
        help="file to export to: .safetensors (with what forecasts need beside it) or .ckpt of the old code's Lightning",
    )


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
        console().print_json(data=store.manifest(path).model_dump(exclude={"files", "tensors"}))
    else:
        export(path, options.to)


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


def export(checkpoint: Path, to: Path | None) -> None:
    """Write one file that loads without DeepSpeed or this project.

    Raises:
        CheckpointError: no file was named, or the checkpoint is damaged.
    """
    if to is None or to.suffix not in (".safetensors", ".ckpt"):
        raise CheckpointError("export needs --to FILE.safetensors or --to FILE.ckpt.")
    m = store.manifest(checkpoint)
    if to.suffix == ".ckpt" and m.config["model"]["elevation_bias"] == "climb":
        raise CheckpointError(
            "the old code has no model.elevation_bias=climb and would take its alpha for descent: export to .safetensors."
        )
    if store.verify(checkpoint):
        raise CheckpointError(f"{checkpoint} is damaged: look at it with `python -m trainer checkpoint verify`.")

    import torch
    from safetensors.torch import save_file

    from trainer.checkpoint import loading
    from trainer.foreign.records import write_whole
    from trainer.model.compat import foreign_names

    weights = loading.load_weights(checkpoint) if m.config.get("ema") is None else loading.load_averaged(checkpoint)
    # No network is built: the shape () of published scalars is the only difference to what the engine holds.
    weights = {name: w.reshape(()) if name.endswith("elevation_alpha") else w for name, w in weights.items()}
    if to.suffix == ".ckpt":
        lightning = {"state_dict": foreign_names(weights), "epoch": 0, "global_step": m.step, "hyper_parameters": m.config}
        write_whole(to, lambda file: torch.save(lightning, file))
    else:
        write_whole(to, lambda file: save_file(weights, file))
        to.with_suffix(".json").write_text(json.dumps(described(m), indent=1))
        _copy_what_forecasts_need(checkpoint.resolve().parent.parent, to)
    print(f"wrote {to}")


def _copy_what_forecasts_need(run_dir: Path, to: Path) -> None:
    """Grid, static fields, order of the scan and what is usual, for `load_forecaster` where the run is not."""
    from data.channels import climatology, surroundings

    for name in (surroundings.FILE, climatology.FILE):
        if (run_dir / name).exists():
            shutil.copyfile(run_dir / name, to.with_suffix(f".{name}"))


def described(m: Manifest) -> dict[str, object]:
    """What must be known to use exported weights."""
    return {
        "step": m.step,
        "config": m.config,
        "statistics": m.statistics,
        "fingerprints": m.fingerprints,
        "val_loss": m.progress.val_loss,
        "val_step": m.progress.val_step,
        "best_val_loss": m.progress.best_val_loss,
        "units": {name: BY_NAME[name].units for name in m.statistics if name in BY_NAME},
    }
