"""Failures of the old model code (F-numbers of the failure list), injected."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.batch import Normalizer
from data.channels.channels import Channels
from data.samples import index_samples
from data.store.layout import Store
from data.stream import Stream
from data.variables import MODEL_INPUTS, MODEL_TARGETS
from data.wind_scan.cache import ScanCache
from tests.unit.test_model import PUBLISHED, SMALL, arguments, randomised
from trainer.model.attention import Attention
from trainer.model.topoflow import Block, TopoFlow, sincos_1d, sincos_2d


def test_f03_elevation_reaches_the_attention_in_metres() -> None:
    """Elevation was normalised and then divided by 1000 m: no alpha could act. A 1 km climb costs exactly alpha."""
    attention = Attention(replace(SMALL, width=8, heads=1, alpha_init=2.0), first=True).double().eval()
    with torch.no_grad():
        attention.qkv.weight.zero_()
        attention.qkv.bias.zero_()
        attention.qkv.weight[16:] = torch.eye(8)  # values are the tokens, scores only the bias
        attention.proj.weight.copy_(torch.eye(8))
        attention.proj.bias.zero_()
    tokens = torch.eye(8, dtype=torch.float64)[None, :2]
    out = attention(tokens, torch.tensor([[0.0, 1000.0]], dtype=torch.float64))
    weights = out.detach()[0, :, :2]
    assert weights[0, 1] / weights[0, 0] == pytest.approx(np.exp(-2.0))
    assert weights[1, 1] == pytest.approx(0.5)  # looking down costs nothing


@pytest.mark.parametrize("alpha", [-0.3, 0.0, 0.3])
def test_f04_alpha_has_a_gradient_on_the_whole_line(alpha: float) -> None:
    """A clamp of the bias left alpha without gradient once it was negative."""
    model = randomised(SMALL)
    with torch.no_grad():
        model.blocks[0].attn.elevation_alpha.fill_(alpha)
    model(*arguments(SMALL)).square().sum().backward()
    assert model.blocks[0].attn.elevation_alpha.grad.abs() > 1e-6


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, (2, 14, 12, 16), r"x must have shape \(B, 15, 12, 16\)"),
        (1, (2, 1), r"lead_hours must have shape \(2,\), got \(2, 1\)"),
        (2, (47,), r"elevation must have shape \(48,\)"),
        (3, (1, 48), r"rank must have shape \(2, 48\)"),
    ],
)
def test_f11_wrong_shapes_are_named_at_the_door(position: int, wrong: tuple[int, ...], message: str) -> None:
    """lead_times of shape (B, 1) broadcast to four dimensions deep inside the network."""
    given = list(arguments(SMALL))
    given[position] = torch.zeros(wrong, dtype=given[position].dtype)
    with pytest.raises(ValueError, match=message):
        randomised(SMALL)(*given)


@pytest.mark.parametrize("training", [True, False])
def test_f28_block_with_inert_bias_equals_the_plain_block_to_the_bit(training: bool) -> None:
    """The physics block added dropout that the baseline block had not."""
    arch = replace(SMALL, drop_path=0.5)
    torch.manual_seed(0)
    plain, biased = (
        Block(replace(arch, elevation_bias=bias), first=True, drop_path=0.5).train(training) for bias in ("none", "descent")
    )
    missing, unexpected = biased.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert set(missing) == {"attn.elevation_alpha", "attn.H_scale"}
    with torch.no_grad():
        biased.attn.elevation_alpha.zero_()
    x, z = torch.randn(4, 48, 24), torch.rand(4, 48) * 4000
    outputs = []
    for block in (plain, biased):
        torch.manual_seed(1)
        outputs.append(block(x, z))
    assert torch.equal(*outputs)
    with torch.no_grad():
        biased.attn.elevation_alpha.fill_(5.0)
    torch.manual_seed(1)
    assert not torch.allclose(outputs[0], biased(x, z), atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_f28_network_with_inert_bias_equals_the_plain_network_to_the_bit(training: bool) -> None:
    """Same seed, same masks of dropout and stochastic depth: an ablation compares the bias and nothing else."""
    arch = replace(SMALL, dropout=0.3, drop_path=0.3)
    biased = randomised(replace(arch, alpha_init=0.0), dtype=torch.float32).train(training)
    plain = TopoFlow(replace(arch, elevation_bias="none")).train(training)
    plain.load_state_dict({k: v for k, v in biased.state_dict().items() if k in plain.state_dict()})
    with torch.no_grad():
        biased.blocks[0].attn.elevation_alpha.zero_()
    outputs = []
    for model in (plain, biased):
        torch.manual_seed(1)
        outputs.append(model(*arguments(arch, dtype=torch.float32)))
    assert torch.equal(*outputs)


def test_f30_every_parameter_starts_with_its_statistics() -> None:
    """A lost initialisation call left position and variable embeddings at zero for three weeks."""
    torch.manual_seed(0)
    model = TopoFlow(PUBLISHED)
    for name, parameter in model.named_parameters():
        p, leaf = parameter.detach(), name.rsplit(".", 1)[-1]
        if name == "var_query" or leaf in ("bias", "in_proj_bias", "proj_biases"):
            expected_mean, expected_std = (1.0, 0.0) if "norm" in name and leaf == "weight" else (0.0, 0.0)
        elif "norm" in name:
            expected_mean, expected_std = 1.0, 0.0
        elif leaf == "elevation_alpha":
            expected_mean, expected_std = 0.01, 0.0
        elif name == "var_agg.in_proj_weight":
            expected_mean, expected_std = 0.0, (2.0 / (3 * 768 + 768)) ** 0.5  # Xavier uniform
        elif name == "pos_embed":
            np.testing.assert_allclose(p[0].numpy(), sincos_2d(768, 64, 128), atol=1e-6)
            continue
        elif name == "var_embed":
            np.testing.assert_allclose(p[0].numpy(), sincos_1d(768, np.arange(15)), atol=1e-6)
            continue
        else:
            expected_mean, expected_std = 0.0, 0.02
        std = float(p.std()) if p.numel() > 1 else 0.0
        assert float(p.mean()) == pytest.approx(expected_mean, abs=3e-3), name
        assert std == pytest.approx(expected_std, rel=0.1, abs=1e-7), name
    assert 0.6 < float(model.pos_embed.detach().std()) < 0.8


def test_f30_position_embedding_encodes_column_then_row() -> None:
    """Position (row, col) by the formula itself: first half of the width the column, second the row."""
    table = sincos_2d(16, 3, 5).reshape(3, 5, 16)
    for row, col in ((0, 0), (1, 3), (2, 4)):
        for k in range(4):
            frequency = 10000.0 ** (-k / 4)
            assert table[row, col, k] == pytest.approx(np.sin(col * frequency), abs=1e-6)
            assert table[row, col, 4 + k] == pytest.approx(np.cos(col * frequency), abs=1e-6)
            assert table[row, col, 8 + k] == pytest.approx(np.sin(row * frequency), abs=1e-6)
            assert table[row, col, 12 + k] == pytest.approx(np.cos(row * frequency), abs=1e-6)


@pytest.mark.parametrize("key", ["drop_path", "dropout"])
def test_f31_configured_regularisation_acts_in_training_only(key: str) -> None:
    """Stochastic depth was configured and never applied: both branches were Identity."""
    arch = replace(SMALL, **{key: 0.5})
    model, given = randomised(arch), arguments(arch)
    plain = TopoFlow(SMALL).double()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(*given), plain.eval()(*given))
    model.train()
    assert not torch.allclose(model(*given), plain(*given))


def test_f31_stochastic_depth_grows_linearly() -> None:
    """0 in the first block, the configured rate in the last."""
    rates = [block.drop_path.drop_prob for block in TopoFlow(replace(SMALL, drop_path=0.1)).blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1])


def test_f32_block_has_both_residual_branches() -> None:
    """A hand-written variant had lost one: with attention and MLP off, a block is the identity."""
    block = Block(SMALL, first=True, drop_path=0.0).double()
    with torch.no_grad():
        for parameter in [*block.attn.proj.parameters(), *block.mlp.fc2.parameters()]:
            parameter.zero_()
    x = torch.randn(2, 48, 24, dtype=torch.float64)
    assert torch.equal(block(x, torch.rand(2, 48, dtype=torch.float64)), x)


def test_f40_changing_the_cache_changes_what_the_model_sees(tiny: Store, tiny_scan: ScanCache) -> None:
    """The cached orders were never read: one method was defined three times."""
    model, hours = randomised(replace(SMALL, grid=(16, 32))), np.array([3, 40])
    x, lead, elevation, _ = arguments(replace(SMALL, grid=(16, 32)))
    before = model(x, lead, elevation, torch.from_numpy(tiny_scan.ranks("regional", hours)))
    orders = tiny_scan.regional_orders[:, ::-1].copy()
    altered = ScanCache(tiny_scan.path, tiny_scan.geometry, tiny_scan.global_orders, orders, tiny_scan.known, "")
    after = model(x, lead, elevation, torch.from_numpy(altered.ranks("regional", hours)))
    assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("mode", ["none", "global", "regional"])
def test_f41_without_mixing_the_network_is_spatially_the_identity(tiny: Store, tiny_scan: ScanCache, mode: str) -> None:
    """Wind order scrambled the map. With attention and MLP off, a pixel influences its own patch only, for any wind."""
    arch = replace(SMALL, grid=(16, 32))
    model = randomised(arch).eval()
    with torch.no_grad():
        for block in model.blocks:
            for parameter in [*block.attn.proj.parameters(), *block.mlp.fc2.parameters()]:
                parameter.zero_()
    x, lead, elevation, _ = arguments(arch)
    rank = torch.from_numpy(np.array(tiny_scan.ranks(mode, np.array([11, 77]))))
    base = model(x, lead, elevation, rank)
    for row, col in ((0, 0), (5, 17), (15, 31)):
        changed = x.clone()
        changed[:, :, row, col] += 1.0
        moved = (model(changed, lead, elevation, rank) - base).abs().amax((0, 1)) > 1e-9
        expected = torch.zeros_like(moved)
        expected[row // 2 * 2 : row // 2 * 2 + 2, col // 2 * 2 : col // 2 * 2 + 2] = True
        assert torch.equal(moved, expected)


def test_f42_sectors_come_from_the_wind_in_metres_per_second(tiny: Store, tiny_scan: ScanCache) -> None:
    """Normalised u and v, with other means and scales, gave another angle."""
    import zarr

    from data.wind_scan.orders import sector_codes

    weather = np.asarray(zarr.open_group(tiny.path, mode="r")["weather"])
    u, v = weather[:, 0], weather[:, 1]
    codes = tiny_scan.sectors(np.arange(tiny_scan.hours))
    np.testing.assert_array_equal(codes, sector_codes(u, v, (4, 4), 16))
    s = tiny.statistics
    wrong = sector_codes((u - s["u"]["mean"]) / s["u"]["std"], (v - s["v"]["mean"]) / s["v"]["std"], (4, 4), 16)
    assert (wrong != codes).mean() > 0.1


def test_f43_one_missing_pixel_stays_one_missing_pixel(tiny: Store) -> None:
    """One NaN made the whole output NaN: a missing input is the training mean, a missing target has no weight."""
    index = index_samples(tiny, "train", [12], None, "none", 1)
    batch = next(Stream(tiny, index, None, "none", 0, 128, False).training(0, 2, 1, 1, 0))
    batch.fields["weather"].nan_to_num_()
    for tensor in (batch.fields["chemistry"], batch.target):
        tensor.copy_(torch.where(torch.isnan(tensor), 5.0, tensor))
    normalizer = Normalizer(tiny, Channels(MODEL_INPUTS), list(MODEL_TARGETS), torch.device("cpu"))
    complete = normalizer(batch)
    batch.fields["chemistry"][0, 0, 3, 4] = torch.nan
    batch.target[1, 2, 8, 9] = torch.nan
    example = normalizer(batch)
    assert torch.isfinite(example.inputs).all()
    assert torch.isfinite(example.targets).all()
    assert example.inputs[0, MODEL_INPUTS.index("pm25"), 3, 4] == 0.0
    assert (example.inputs != complete.inputs).sum() == 1
    assert example.weight[1, 2, 8, 9] == 0.0
    assert (example.weight != complete.weight).sum() == 1
    assert example.missing_inputs == pytest.approx(1 / example.inputs.numel())
    model = TopoFlow(replace(SMALL, grid=(16, 32))).eval()
    rank = torch.arange(128).expand(2, -1)
    assert torch.isfinite(model(example.inputs, batch.lead_hours, torch.zeros(128), rank)).all()
