"""Our copies of timm's layers against timm itself, to the bit."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch

from trainer.model.architecture import Architecture, parameter_count
from trainer.model.layers import DropPath, Mlp, trunc_normal_
from trainer.model.topoflow import TopoFlow

DECLARED: list[torch.library.Library] = []  # a Library undefines its operators when it is collected


@pytest.fixture(scope="module")
def timm_layers() -> ModuleType:
    """timm imports torchvision, whose wheel is built for CUDA: beside a CPU torch its compiled operators are absent, and two
    of them have to be declared before it can be imported. Nothing here calls them."""
    if not torch.cuda.is_available():
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        DECLARED.append(library)
    return importlib.import_module("timm.layers")


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_stochastic_depth_drops_what_timm_drops(rate: float, timm_layers: ModuleType) -> None:
    x = torch.randn(64, 5, 7)
    for training in (True, False):
        ours, theirs = DropPath(rate).train(training), timm_layers.DropPath(rate).train(training)
        torch.manual_seed(1)
        first = ours(x)
        torch.manual_seed(1)
        assert torch.equal(first, theirs(x))


def test_the_perceptron_is_timm_s(timm_layers: ModuleType) -> None:
    theirs = timm_layers.Mlp(24, 96)
    ours = Mlp(24, 96)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 9, 24)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("std", [0.02, 0.3, 1.5])
def test_initial_weights_are_timm_s(std: float, timm_layers: ModuleType) -> None:
    ours, theirs = torch.empty(300, 70), torch.empty(300, 70)
    torch.manual_seed(2)
    trunc_normal_(ours, std=std)
    torch.manual_seed(2)
    timm_layers.trunc_normal_(theirs, std=std)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    if std == 0.02:  # as published
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "change", [{}, {"elevation_bias": "none"}, {"elevation_bias": "climb", "relative_position": True, "embedding_norm": True}]
)
def test_parameters_are_counted_without_building_the_network(change: dict) -> None:
    arch = Architecture((8, 24), 7, (2, 4), patch=2, width=48, depth=3, heads=4, mlp_ratio=2.5, **change)
    assert parameter_count(arch) == sum(p.numel() for p in TopoFlow(arch).parameters())
