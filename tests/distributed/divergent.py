"""Started by test_checkpoint_faults.py: at every ZeRO stage, ranks that agree, then one whose weights are corrupted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

from trainer import runtime
from trainer.checkpoint import consistency
from trainer.checkpoint.store import CheckpointError
from trainer.config import load
from trainer.engine import build_engine, resolve_deepspeed
from trainer.inputs import architecture
from trainer.model.topoflow import TopoFlow

world = runtime.join(2.0)
run = load(Path(sys.argv[1]))
for zero, path in json.loads(sys.argv[2]).items():
    torch.manual_seed(world.rank)  # different on purpose: the broadcast must make them equal
    model = TopoFlow(architecture(run))
    consistency.broadcast_from_main(model.parameters(), bucket_bytes=4096)
    reference = consistency.hash_tensors(model.named_parameters())
    engine = build_engine(model, run, resolve_deepspeed(path, run, world.size))
    consistency.require_loaded(engine, reference)
    print(f"ZeRO {zero} rank {world.rank} equal\n", end="", flush=True)
    if world.rank == 2:
        victim = dict(engine.module.named_parameters())["norm.bias"]
        if zero == "3":
            safe_set_local_fp32_param(victim, safe_get_local_fp32_param(victim) + 1.0)
        else:
            victim.data[3] += 1.0
    try:
        consistency.require_loaded(engine, reference)
    except CheckpointError as error:
        print(f"ZeRO {zero} rank {world.rank} refused: {error}\n", end="", flush=True)
runtime.leave()
