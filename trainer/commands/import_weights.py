"""Convert foreign weights, completely or not at all, to a directory that init_from reads."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from trainer.config_file import load

EXAMPLES = """  python -m trainer import --from old.ckpt --to weights/published \\
      --config launch/configs/china_128x256.yaml --allow-missing elevation_alpha"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    formats = "Lightning .ckpt, state dict, safetensors, DeepSpeed or our checkpoint directory"
    add("--from", dest="source", type=Path, required=True, help=formats)
    add("--to", type=Path, required=True, help="directory to write")
    add("--config", type=Path, required=True, help="run whose model section describes the network")
    add("--allow-missing", action="append", default=[], metavar="NAME", help="repeatable")
    add("overrides", nargs="*", metavar="key=value")


def run(options: argparse.Namespace) -> None:
    config = load(options.config, options.overrides)

    import torch
    from safetensors.torch import save_file

    from trainer.checkpoint.manifest import sha256_of
    from trainer.foreign.records import RECORD, REPORT, recorded_beside, write_report, write_whole
    from trainer.foreign.weights import import_weights
    from trainer.model.topoflow import TopoFlow

    torch.manual_seed(config.seed)
    model = TopoFlow(config.architecture())
    tensors, report = import_weights(model, options.source, options.allow_missing, config.data.channels().names)
    report.show(sys.stdout)
    report.refuse_unless_complete()
    recorded = recorded_beside(options.source)
    options.to.mkdir(parents=True, exist_ok=True)
    content = {name: t.contiguous() for name, t in tensors.items()}
    written = write_whole(options.to / "weights.safetensors", lambda file: save_file(content, file))
    write_report(report, options.to / REPORT, sha256=sha256_of(written))
    if recorded is not None:
        (options.to / RECORD).write_text(json.dumps(recorded, indent=1))
    print(f"wrote {options.to}: start from it with init_from.path={options.to}")
