"""Optimizer groups and hyperparameters."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from tests.launching import ROOT
from trainer.checkpoint import zero
from trainer.config_file import load
from trainer.engine import grouped_parameters, parameter_groups, set_learning_rates
from trainer.model.topoflow import TopoFlow

DEMO = ROOT / "launch" / "configs" / "demo.yaml"


def test_f05_alpha_has_its_own_rate_and_no_decay() -> None:
    """Alpha shared the blocks' rate and weight decay and moved 0.004 in 270 steps."""
    keys = ["model.elevation_bias=descent", "optimizer.lr=1e-4", "optimizer.alpha_lr=3e-2", "optimizer.weight_decay=0.1"]
    run = load(DEMO, keys)
    model = TopoFlow(run.architecture())
    groups = {group["name"]: group for group in parameter_groups(model, run)}
    assert groups["elevation_alpha"]["params"] == [model.blocks[0].attn.elevation_alpha]
    assert (groups["elevation_alpha"]["peak_lr"], groups["elevation_alpha"]["weight_decay"]) == (3e-2, 0.0)
    assert (groups["decay"]["peak_lr"], groups["decay"]["weight_decay"]) == (1e-4, 0.1)
    assert groups["no_decay"]["weight_decay"] == 0.0
    layout: dict[str, list[str]] = {}
    for name, about in grouped_parameters(model, run).items():
        layout.setdefault(about["group"], []).append(name)
    assert sum(map(len, layout.values())) == len(list(model.parameters()))
    assert {"pos_embed", "var_embed", "var_query", "norm.weight", "head.0.bias"} <= set(layout["no_decay"])
    assert {"head.0.weight", "token_embeds.proj_weights", "var_agg.in_proj_weight"} <= set(layout["decay"])


def test_f27_the_rates_and_decay_of_a_resumed_run_are_those_of_its_configuration() -> None:
    """Rates came back with the optimizer's state: nothing but moments and a count is loaded, so an allowed change acts."""
    run = load(DEMO, ["optimizer.lr=2e-3", "optimizer.weight_decay=0.2", "schedule.warmup_steps=0"])
    optimizer = torch.optim.AdamW(parameter_groups(TopoFlow(run.architecture()), run))
    assert set_learning_rates(SimpleNamespace(optimizer=optimizer), 0, run) == 2e-3
    assert optimizer.param_groups[0]["weight_decay"] == 0.2
    assert {kind for kind in zero.MOMENTS} == {"exp_avg", "exp_avg_sq"}
