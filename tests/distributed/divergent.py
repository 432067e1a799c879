"""Started by test_checkpoint_faults.py: at every ZeRO stage ranks that agree, then one with corrupted weights or moments."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

from trainer.checkpoint import state, zero
from trainer.checkpoint.manifest import CheckpointError
from trainer.config_file import load
from trainer.engine import build_engine, resolve_deepspeed
from trainer.model.topoflow import TopoFlow
from trainer.process import launch

world = launch.join(2.0)
run = load(Path(sys.argv[1]))
generator = torch.Generator().manual_seed(1)


def proven(kind: str) -> None:
    try:
        state.prove(engine, hashes)
        said = "equal"
    except CheckpointError as error:
        said = f"refused {kind}: {error}"
    print(f"ZeRO {stage} rank {world.rank} {said}\n", end="", flush=True)


for stage, path in json.loads(sys.argv[2]).items():
    torch.manual_seed(world.rank)  # different on purpose: loading must make them equal
    model = TopoFlow(run.architecture())
    engine = build_engine(model, run, resolve_deepspeed(path, run, world.size))
    named = state.Named()
    if world.is_main:
        for name, parameter in engine.module.named_parameters():
            shape = zero.shape_of(parameter)
            named.weights[name] = torch.randn(shape, generator=generator)
            named.moments |= {f"{name}.{kind}": torch.rand(shape, generator=generator) for kind in zero.MOMENTS}
            named.moments[f"{name}.step"] = torch.tensor(7.0)
        named.weights |= {n: b.float() for n, b in engine.module.named_buffers() if n in engine.module.state_dict()}
    state.restore(engine, named)
    hashes = state.hashes_of(named, engine)
    proven("at once")
    victim = dict(engine.module.named_parameters())["norm.bias"]
    kept = zero.read_parameter(engine, victim, None).clone()
    if world.rank == 2:
        if stage == "3":
            safe_set_local_fp32_param(victim, safe_get_local_fp32_param(victim) + 1.0)
        else:
            victim.data[3] += 1.0
    proven("weights")
    zero.write_parameter(engine, victim, None, kept)
    zero.write_forward(victim, kept)
    wrong = zero.read_parameter(engine, victim, "exp_avg").clone()
    if world.rank == 2 or stage != "0":  # under ZeRO every rank holds a share, and what is gathered is wrong everywhere
        wrong[3] += 1.0
    zero.write_parameter(engine, victim, "exp_avg", wrong)
    proven("moments")
    dist.barrier()
launch.leave()
