"""The network of the release of 2026: arithmetic against a version written out in float64, cost in memory, dropout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests import release
from tests.launching import ROOT
from trainer.config_file import load
from trainer.model import elevation_bias
from trainer.model.architecture import Architecture, parameter_count
from trainer.model.compat import foreign_names, moved_arguments, release_orders, translate
from trainer.model.elevation_bias import bucket_of, cell_numbers, chunked_attention
from trainer.model.topoflow import TopoFlow, patch_mean

ARCH = Architecture(
    (12, 20),
    15,
    (12, 5, 6, 7, 8, 9),
    width=24,
    depth=2,
    heads=3,
    dropout=0.0,
    drop_path=0.0,
    alpha_init=2.0,
    bias_floor=-10.0,
    relative_position=True,
    embedding_norm=True,
)


def network(state: dict[str, Tensor], arch: Architecture = ARCH) -> TopoFlow:
    model = TopoFlow(arch).double()
    translated = translate(state, {name: tensor.shape for name, tensor in model.state_dict().items()}).state
    missing, unexpected = model.load_state_dict({name: tensor.double() for name, tensor in translated.items()}, strict=False)
    assert (missing, unexpected) == (["blocks.0.attn.H_scale"], [])
    return model


@pytest.mark.parametrize("scan", [True, False])
def test_output_and_gradients_are_those_of_the_release(scan: bool) -> None:
    """Elevations of kilometres, so that the clamp acts, too."""
    state = {name: tensor.double().requires_grad_() for name, tensor in release.checkpoint(ARCH).items()}
    model = network(state)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 15, 12, 20, generator=generator, dtype=torch.float64)
    x[:, 13] *= 4000.0
    x[:, :2] += torch.tensor([[0.3, 0.2], [-0.4, 0.1], [0.0, -0.5]])[..., None, None]
    lead = torch.tensor([12.0, 48.0, 96.0], dtype=torch.float64)
    truth = release.forward(state, ARCH, x, lead, scan)
    elevation = patch_mean(x[:, 13], 2).double()
    raster = torch.arange(60).expand(3, -1)
    given = moved_arguments(x, lead, elevation, 2, release_orders) if scan else (x, lead, elevation, raster)
    ours = model(*given)
    assert float((ours - truth).detach().norm() / truth.detach().norm()) < 1e-6  # patch means of elevation are fp32
    cotangent = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    (truth * cotangent).sum().backward()
    (ours * cotangent).sum().backward()
    found = foreign_names({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found.keys() == state.keys()
    for name, gradient in found.items():
        expected = state[name].grad
        assert expected is not None
        assert float((gradient - expected).norm() / (expected.norm() + 1e-9)) < 1e-5, name


def test_orders_are_those_of_the_release() -> None:
    """Every sector, winds between them, and none."""
    angles = torch.linspace(0, 6.28, 45)
    x = torch.zeros(46, 2, 24, 16)
    x[:45, 0], x[:45, 1] = (f(angles)[:, None, None].expand(-1, 24, 16) for f in (torch.cos, torch.sin))
    x += 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    orders = release_orders(x, (12, 8))
    assert orders.tolist() == [release.order(sample, 12, 8) for sample in x]
    assert len({tuple(order) for order in orders.tolist()}) == 16


@pytest.mark.parametrize("cells", [1, 6, 64, 100, 128, 200])
def test_buckets_are_those_of_the_logarithm(cells: int) -> None:
    places = [int(c / cells * 128) for c in range(cells)]
    assert cell_numbers(cells).tolist() == places
    assert bucket_of(torch.tensor(places)).tolist() == [[release.bucket(j - i) for j in places] for i in places]


class Largest(TorchDispatchMode):
    """The most elements that one tensor had."""

    found = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.found = max(self.found, tensor.numel())
        return result


def test_memory_is_linear_in_the_number_of_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the rows: twice the largest tensor. All pairs of patches would be four times as many."""
    monkeypatch.setattr(elevation_bias, "QUERY_CHUNK", 16)
    sizes = []
    for rows in (32, 64, 128):
        q = torch.randn(1, rows * 8, 3, 2, 8, requires_grad=True)
        table, slope = torch.randn(1024, 2, requires_grad=True), torch.tensor(1e-3, requires_grad=True)
        buckets = bucket_of(cell_numbers(rows)), bucket_of(cell_numbers(8))
        with Largest() as largest:
            chunked_attention(q, torch.rand(1, rows * 8), slope, -10.0, table, buckets).sum().backward()
        sizes.append(largest.found)
    assert sizes[1] <= 2 * sizes[0]
    assert sizes[2] <= 2 * sizes[1]
    assert sizes[2] < (128 * 8) ** 2


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("elevation", ["none", "descent"])
def test_the_first_block_drops_weights_of_attention(relative: bool, elevation: str) -> None:
    """A share of them, the rest as much larger; the backward pass has the same masks; evaluation drops nothing."""
    arch = replace(ARCH, relative_position=relative, elevation_bias=elevation, first_block_dropout=0.3, bias_floor=None)
    attention = TopoFlow(arch).blocks[0].attn.train()
    qkv = torch.zeros(40, 60, 3, 3, 8, requires_grad=True)  # all weights are alike
    with torch.no_grad():
        qkv[:, 7, 2] = 1.0  # only one key has a value
        if attention.relative_position is not None:
            attention.relative_position.zero_()
    z = torch.zeros(40, 60)
    out = attention._attend(qkv, z)
    share = float((out == 0).double().mean())
    assert 0.27 < share < 0.33
    kept = out[out != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 60 / 0.7))
    (gradient,) = torch.autograd.grad(out.sum(), qkv)
    torch.testing.assert_close(gradient[:, 7, 2].sum(), out.sum(), rtol=1e-4, atol=0)
    assert (attention.eval()._attend(qkv, z) != 0).all()


def test_the_configuration_has_the_release_s_parameters() -> None:
    """52,481,341 of the published network, 1024 x 8 of the table, 2 x 768 of the norm."""
    arch = load(ROOT / "launch/configs/release_128x256.yaml", []).architecture()
    assert parameter_count(arch) == 52_481_341 + 8192 + 1536
    assert (arch.alpha_init, arch.bias_floor, arch.first_block_dropout) == (2.0, -10.0, 0.1)


def test_other_weights_start_as_those_of_the_published_network() -> None:
    """So that an ablation with one seed starts from one network."""
    plain = replace(ARCH, relative_position=False, embedding_norm=False, elevation_bias="none")
    starts = []
    for arch in (ARCH, plain, replace(plain, elevation_bias="climb")):
        torch.manual_seed(4)
        starts.append(TopoFlow(arch).state_dict())
    for name, tensor in starts[1].items():
        assert all(torch.equal(start[name], tensor) for start in starts), name
