"""`python -m trainer import` and `python -m trainer checkpoint`: weights in, weights out, and what a run has kept."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from data.variables import BY_NAME
from trainer.checkpoint import resume, store
from trainer.checkpoint.pretrained import RECORD, recorded_beside, write_report
from trainer.checkpoint.store import CheckpointError
from trainer.config import load
from trainer.inputs import architecture
from trainer.model.topoflow import TopoFlow
from trainer.trained import import_weights, run_command

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
        options.to.mkdir(parents=True, exist_ok=True)
        write_report(report, options.to / "import.json")
        report.show(console)
        report.refuse_unless_complete()
        save_file({name: t.contiguous() for name, t in tensors.items()}, options.to / "weights.safetensors")
        recorded = recorded_beside(options.source)
        if recorded is not None:
            (options.to / RECORD).write_text(json.dumps(recorded, indent=1))
        console.print(f"wrote {options.to}: start from it with init_from.path={options.to}")

    return run_command(argv, parser, command)


def checkpoint_main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer checkpoint", description="List, verify, show, export or convert checkpoints.",
        epilog="examples:\n  python -m trainer checkpoint list runs/demo\n"
        "  python -m trainer checkpoint verify runs/demo/checkpoints/latest\n"
        "  python -m trainer checkpoint export runs/demo/checkpoints/latest --to model.safetensors\n"
        "  python -m trainer checkpoint export runs/demo/checkpoints/latest --to old_names.ckpt\n"
        "  python -m trainer checkpoint convert runs/demo/checkpoints/latest    # ready for another number of ranks",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("path", type=Path, help="run directory (list), or one checkpoint")
    parser.add_argument("--to", type=Path, help="file to export to: .safetensors (with a .json beside it) or Lightning's .ckpt")
    return run_command(argv, parser, lambda options: ACTIONS[options.action](options))


def _list(options: argparse.Namespace) -> None:
    table = Table("checkpoint", "step", "validation loss", "ranks", "ZeRO", "GB")
    found = store.committed(options.path)
    if not found:
        raise CheckpointError(f"no checkpoint in {options.path}.")
    for checkpoint in found:
        m = store.manifest(checkpoint)
        loss = "-" if m["val_step"] != m["step"] else f"{m['val_loss']:.4f}"
        size = sum(f["bytes"] for f in m["files"].values()) / 1e9
        table.add_row(checkpoint.name, str(m["step"]), loss, str(m["world_size"]), str(m["zero_stage"]), f"{size:.3f}")
    Console().print(table)


def _verify(options: argparse.Namespace) -> None:
    problems = store.verify(options.path)
    if problems:
        raise CheckpointError(f"{options.path} is damaged:\n" + "\n".join(f"  {p}" for p in problems))
    print(f"{options.path}: {len(store.manifest(options.path)['files'])} files have their recorded hashes")


def _show(options: argparse.Namespace) -> None:
    Console().print_json(data={k: v for k, v in store.manifest(options.path).items() if k != "files"})


def _export(options: argparse.Namespace) -> None:
    """One file that loads without DeepSpeed or this project."""
    if options.to is None or options.to.suffix not in (".safetensors", ".ckpt"):
        raise CheckpointError("export needs --to FILE.safetensors or --to FILE.ckpt.")
    m = store.manifest(options.path)
    # No network is built: the shape () of published scalars is the only difference to what the engine holds.
    state = {k: v.reshape(()) if k.endswith("elevation_alpha") else v for k, v in store.load_weights(options.path).items()}
    if options.to.suffix == ".ckpt":
        lightning = {"state_dict": {LIGHTNING_PREFIX + k: v for k, v in state.items()}, "epoch": 0, "global_step": m["step"],
                     "hyper_parameters": m["config"]}  # fmt: skip
        torch.save(lightning, options.to)
    else:
        about = {k: m[k] for k in ("step", "config", "statistics", "fingerprints", "val_loss", "val_step", "best_val_loss")}
        about["units"] = {name: BY_NAME[name].units for name in m["statistics"]}
        save_file(state, options.to)
        options.to.with_suffix(".json").write_text(json.dumps(about, indent=1))
    print(f"wrote {options.to}")


def _convert(options: argparse.Namespace) -> None:
    """What a resume on other ranks would do first, done beforehand."""
    checkpoint = options.path.resolve()  # "latest" is a link
    seconds = resume.convert(checkpoint)
    print(f"wrote {resume.universal_form(checkpoint)} in {seconds:.1f} s: a run on any number of ranks finds it")


ACTIONS = {"list": _list, "verify": _verify, "show": _show, "export": _export, "convert": _convert}
