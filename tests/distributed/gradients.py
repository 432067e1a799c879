"""Started by test_environment_faults.py on eight ranks: the averaged bf16 gradient against float64, at every ZeRO stage.

Every rank computes its micro-batches' gradients with a plain bf16 copy of the network; their float64 mean is the truth.
The engine's own is read from AdamW's first moment after one step: exp_avg = (1 - beta1) x gradient.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from trainer.checkpoint import state, zero
from trainer.config_file import load
from trainer.engine import build_engine, resolve_deepspeed
from trainer.process import launch

world = launch.join(2.0)
run = load(Path(sys.argv[1]), ["precision=bf16", "batch={total: 32, micro: 1}", "optimizer={clip: 1.0e+9, lr: 1.0e-4}"])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 8))


for stage, path in json.loads(sys.argv[2]).items():
    model = network()
    named = state.Named({k: v.detach().clone() for k, v in model.state_dict().items()} if world.is_main else {})
    engine = build_engine(model, run, resolve_deepspeed(path, run, world.size))
    state.restore(engine, named)
    plain = network().bfloat16()
    truth = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in plain.named_parameters()}
    generator = torch.Generator().manual_seed(world.rank)
    for _ in range(4):
        x, y = (torch.randn(6, n, generator=generator).bfloat16() for n in (24, 8))
        gradients = torch.autograd.grad(((plain(x) - y) ** 2).float().mean(), list(plain.parameters()))
        for name, gradient in zip(truth, gradients, strict=True):
            truth[name] += gradient.double() / (4 * world.size)
        engine.backward(((engine(x) - y) ** 2).float().mean())
        engine.step()
    worst = 0.0
    for name, parameter in engine.module.named_parameters():
        dist.all_reduce(truth[name])
        ours = zero.read_parameter(engine, parameter, "exp_avg").double() / (1 - run.optimizer.betas[0])
        worst = max(worst, float((ours - truth[name]).norm() / truth[name].norm()))
    if world.is_main:
        print(f"GRADIENT {json.dumps({'zero': stage, 'error': worst})}", flush=True)
launch.leave()
