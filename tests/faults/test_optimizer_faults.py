"""Optimizer groups and hyperparameters."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from tests.launching import ROOT
from trainer.config import load
from trainer.engine import optimizer_layout, parameter_groups, restate_hyperparameters, set_learning_rates
from trainer.inputs import architecture
from trainer.model.topoflow import TopoFlow

DEMO = ROOT / "launch" / "configs" / "demo.yaml"


def test_f05_alpha_has_its_own_rate_and_no_decay() -> None:
    """Alpha shared the blocks' rate and weight decay and moved 0.004 in 270 steps."""
    run = load(DEMO, ["optimizer.lr=1e-4", "optimizer.alpha_lr=3e-2", "optimizer.weight_decay=0.1"])
    model = TopoFlow(architecture(run))
    groups = {group["name"]: group for group in parameter_groups(model, run)}
    assert groups["elevation_alpha"]["params"] == [model.blocks[0].attn.elevation_alpha]
    assert (groups["elevation_alpha"]["peak_lr"], groups["elevation_alpha"]["weight_decay"]) == (3e-2, 0.0)
    assert (groups["decay"]["peak_lr"], groups["decay"]["weight_decay"]) == (1e-4, 0.1)
    assert groups["no_decay"]["weight_decay"] == 0.0
    layout = {name: [n for n, _ in members] for name, members in optimizer_layout(model, run)}
    assert sum(map(len, layout.values())) == len(list(model.parameters()))
    assert {"pos_embed", "var_embed", "var_query", "norm.weight", "head.0.bias"} <= set(layout["no_decay"])
    assert {"head.0.weight", "token_embeds.proj_weights", "var_agg.in_proj_weight"} <= set(layout["decay"])


def test_f27_loaded_hyperparameters_give_way_to_the_configuration() -> None:
    """A load brings the checkpoint's rates and decay back; an allowed change must act."""
    old, new = (load(DEMO, [f"optimizer.lr={lr}", f"optimizer.weight_decay={wd}", "schedule.warmup_steps=0"])
                for lr, wd in ((1e-3, 0.1), (2e-3, 0.2)))  # fmt: skip
    model = TopoFlow(architecture(old))
    saved = torch.optim.AdamW(parameter_groups(model, old)).state_dict()
    optimizer = torch.optim.AdamW(parameter_groups(model, new))
    optimizer.load_state_dict(saved)
    engine = SimpleNamespace(module=model, optimizer=optimizer)
    assert set_learning_rates(engine, 0, new) == 1e-3
    restate_hyperparameters(engine, new)
    assert set_learning_rates(engine, 0, new) == 2e-3
    assert optimizer.param_groups[0]["weight_decay"] == 0.2
