"""Started by test_import.py: an engine whose weights are corrupted on one rank, which the comparison must name."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from trainer import runtime
from trainer.checkpoint import consistency
from trainer.checkpoint.store import CheckpointError
from trainer.config import load
from trainer.engine import build_engine, resolve_deepspeed
from trainer.inputs import architecture
from trainer.model.topoflow import TopoFlow

config, zero, corrupt = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "corrupt"
world = runtime.join(2.0)
run = load(config)
torch.manual_seed(world.rank)  # different on purpose: the broadcast must make them equal
model = TopoFlow(architecture(run))
consistency.broadcast_from_main(model.parameters(), bucket_bytes=4096)
reference = consistency.hash_tensors(model.named_parameters())
engine = build_engine(model, run, resolve_deepspeed(f"ds_configs/zero{zero}.json", run, world.size))
hashes = consistency.hash_masters(engine)
if corrupt and world.rank == 2:
    hashes["norm.bias"] = "0" * 64
try:
    consistency.require_equal(hashes, reference, "test")
    print(f"rank {world.rank} equal", flush=True)
except CheckpointError as error:
    print(f"rank {world.rank} refused: {error}", flush=True)
dist.barrier()
runtime.leave()
