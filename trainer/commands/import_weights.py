"""Convert weights of any kind, completely or not at all, to a directory that init_from reads."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from trainer.commands import add_weights, source_of
from trainer.config_file import load

EXAMPLES = """  python -m trainer import --from old.ckpt --to weights/published \\
      --config launch/configs/china_128x256.yaml --allow-missing elevation_alpha
  python -m trainer import --from runs/first --to weights/first --config CONFIG --allow-change wind_scan.mode"""
REPORT = "import.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    formats = "a run, checkpoint or export of ours; Lightning, state dict, safetensors, DeepSpeed"
    add("--from", dest="source", type=Path, required=True, help=formats)
    add("--to", type=Path, required=True, help="directory to write")
    add("--config", type=Path, required=True, help="run whose model section describes the network")
    add_weights(parser)
    add("overrides", nargs="*", metavar="key=value")


def run(options: argparse.Namespace) -> None:
    config = load(options.config, options.overrides)

    import torch

    from trainer.checkpoint.manifest import MANIFEST, CheckpointError
    from trainer.checkpoint.record import TRAINED, Record, write_tensors, write_whole
    from trainer.checkpoint.state import WEIGHTS_FILE
    from trainer.model.topoflow import TopoFlow
    from trainer.weights.fit import fit
    from trainer.weights.reading import wanted

    if (options.to / MANIFEST).exists():
        raise CheckpointError(f"{options.to} is a checkpoint, and stays: choose another --to.")
    torch.manual_seed(config.seed)
    source = source_of(options, options.source)
    weights = wanted(source)
    network = TopoFlow(config.architecture())
    tensors, report = fit(weights, network, config, source)
    report.show(sys.stdout)
    report.refuse_unless_complete()
    tree = config.model_dump(mode="json")
    record = Record(config=tree, which=weights.taken or TRAINED, made_from=weights.made_from)
    if weights.record is not None:
        kept = {"step", "statistics", "fingerprints"} | ({"val_loss"} if report.same_function else set())
        record = record.model_copy(update=weights.record.model_dump(include=kept))
    options.to.mkdir(parents=True, exist_ok=True)
    content = {name: t.contiguous() for name, t in tensors.items()}
    write_whole(options.to / WEIGHTS_FILE, lambda file: write_tensors(file, content, record))
    (options.to / REPORT).write_text(json.dumps(report.to_json(), indent=1))
    (options.to / "recorded.json").unlink(missing_ok=True)  # where imports once had their record
    print(f"wrote {options.to}: start from it with init_from.path={options.to}")
