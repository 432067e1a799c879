"""A foreign training under DeepSpeed, saved at steps 2 and 6: shards.py CONFIG STAGE FOLDER."""

import argparse
import sys
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from trainer.config_file import load
from trainer.model.topoflow import TopoFlow
from trainer.process import launch

if sys.argv[2] == "1":  # as early Pythons 3.11 pickle an enumeration
    ZeroStageEnum.__reduce_ex__ = lambda self, _: (getattr, (type(self), self.name))
joined = launch.join(2.0)
torch.manual_seed(7)
network = TopoFlow(load(sys.argv[1]).architecture())
settings: dict[str, Any] = {"train_batch_size": 2, "zero_optimization": {"stage": int(sys.argv[2])}}
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
rank = torch.arange(128)[None]
for step in range(1, 7):
    out = engine(torch.randn(1, 15, 16, 32), torch.tensor([6.0]), torch.zeros(1, 128), rank)
    engine.backward((out**2).mean())
    engine.step()
    if step in (2, 6):
        beside = {"args": argparse.Namespace(lr=1e-2), "scaler": torch.optim.AdamW}  # as people keep them
        engine.save_checkpoint(f"{sys.argv[3]}/at{step}", tag="checkpoint", client_state=beside)
launch.leave()
