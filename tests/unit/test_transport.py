"""What the air met on its way: against uniform flow, a brute-force sum, and sources that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data.channels.sun import cosine_of_zenith
from data.channels.transport import Transport
from data.store.layout import Store
from data.wind_paths.cache import GONE, geometry_of, quantised
from data.wind_paths.trajectories import PathGrid
from trainer.model.architecture import Architecture
from trainer.model.sources import Sources

CPU = torch.device("cpu")
POINTS = 8  # 24 h


def uniform(store: Store, rows: float, cols: float, count: int = 2, points: int = POINTS) -> torch.Tensor:
    """Records of air that has moved by so many rows and columns every three hours."""
    geometry, centres = geometry_of(store, 2, 48), PathGrid.of(store).centres(2).numpy()
    back = -np.array([rows, cols])[None, :, None] * np.arange(1, points + 1)[:, None, None]
    paths = np.broadcast_to((centres.T[None] + back).astype("f4"), (count, points, 2, len(centres)))
    return torch.from_numpy(quantised(paths, centres, geometry))


@pytest.fixture
def transport(tiny: Store) -> Transport:
    return Transport(tiny, geometry_of(tiny, 2, 48), CPU)


def test_the_analysis_is_carried_as_far_as_the_wind_blows_and_no_further_than_the_lead_time(
    tiny: Store, transport: Transport
) -> None:
    """A plane is carried exactly; what came from outside, or from missing cells, is missing."""
    rows, cols = tiny.grid
    plane = torch.arange(rows)[:, None] * 3.0 + torch.arange(cols) * 7.0
    analysis = plane.expand(2, 1, rows, cols).clone()
    records = uniform(tiny, 0.25, 0.5)
    leads = torch.tensor([12.0, 24.0])
    carried = transport.carried(analysis, transport.ways(records, leads))
    unit = max(transport.geometry.row_step, transport.geometry.col_step)
    for sample, steps in enumerate((4, 8)):
        expected = plane - steps * (0.25 * 3.0 + 0.5 * 7.0)
        inner = torch.isfinite(carried[sample, 0])
        assert inner[4:-4, 6:-2].all()
        assert not inner[:, 0].any()
        inner[:2] = inner[-2:] = inner[:, :6] = inner[:, -2:] = False  # cells beside the border are not interpolated
        assert (carried[sample, 0] - expected)[inner].abs().max() < 10.0 * unit
    analysis[:, :, 5:9, 10:14] = torch.nan
    assert torch.isnan(transport.carried(analysis, transport.ways(records, leads))[0, 0, 8, 14])


def test_the_exposure_of_still_air_is_the_population_where_it_is(tiny: Store, transport: Transport) -> None:
    still = transport.exposure(transport.ways(uniform(tiny, 0.0, 0.0), torch.tensor([12.0, 24.0])))
    population = np.log1p(tiny.static["population"])
    expected = torch.from_numpy((population - population.mean()) / population.std()).float()
    torch.testing.assert_close(still, expected.expand(2, 2, -1, -1), rtol=1e-4, atol=1e-4)


def test_factors_are_those_of_the_place_and_the_hour(tiny: Store, transport: Transport) -> None:
    leads = torch.tensor([12.0, 24.0])
    records = uniform(tiny, 0.0, 0.25)
    records[0, 1:, :, 7] = GONE
    ways = transport.ways(records, leads)
    valid = torch.tensor([400_000.0, 400_007.0], dtype=torch.float64)
    one, wind, dust, night = transport.factors(ways, valid, ["one", "wind", "dust", "night"]).unbind(1)
    east = torch.arange(tiny.grid[1]).repeat(tiny.grid[0]) > 8  # whose air has not come from outside
    np.testing.assert_allclose(one.sum(1)[1, east], 24.0)  # the trapezoid rule: the lead time
    of_patch_7 = [row * tiny.grid[1] + col for row in (0, 1) for col in (14, 15)]  # known for three hours only
    np.testing.assert_allclose(one[0].sum(0)[of_patch_7], 3.0)
    east[of_patch_7] = False
    np.testing.assert_allclose(one[0].sum(0)[east], 12.0)
    grid = PathGrid.of(tiny)
    latitude = np.deg2rad(np.repeat(grid.lat, tiny.grid[1]))
    steps = round(0.25 / transport.geometry.col_step) * transport.geometry.col_step
    speed = steps * grid.col_km * np.cos(latitude) / (3 * 3.6)
    np.testing.assert_allclose((wind / one)[1, 2, east], (speed / 5)[east] ** 2, rtol=0.05)
    np.testing.assert_allclose((dust / one)[1, 2, east], (np.maximum(speed - 6, 0) / 3)[east] ** 2, rtol=0.1, atol=1e-2)
    sun = cosine_of_zenith(valid - 6.0, torch.from_numpy(grid.lat), torch.from_numpy(grid.lon))
    dark = (sun <= 0).float().flatten(1)
    assert ((night / one)[:, 2] == dark)[:, east].float().mean() > 0.95  # the air is up to 0.5 columns further west


def architecture(store: Store, kinds: tuple[str, ...] = ("one", "wind")) -> Architecture:
    return Architecture(grid=store.grid, variables=15, target_channels=(5, 6, 7), sources=kinds)


def test_sources_are_the_sum_that_the_equation_says(tiny: Store, transport: Transport) -> None:
    """Against loops in float64 over targets, kinds, points and cells."""
    arch, rng = architecture(tiny), np.random.default_rng(1)
    layer = Sources(arch)
    with torch.no_grad():
        layer.source_maps.copy_(torch.from_numpy(rng.normal(size=layer.source_maps.shape)))
        layer.log_lifetime.copy_(torch.log(torch.tensor([6.0, 20.0, 50.0])))
    ways = transport.ways(uniform(tiny, 0.3, 0.4), torch.tensor([9.0, 24.0]))
    factors = transport.factors(ways, torch.tensor([4e5, 4e5], dtype=torch.float64), arch.sources)
    with torch.no_grad():
        found = layer(transport.places(ways), factors, ways.ages, [4, 9])
    maps, (rows, cols) = layer.source_maps.detach().double().numpy(), tiny.grid
    expected = np.zeros((2, 3, factors.shape[-1]))
    for sample, point, cell in np.ndindex(2, factors.shape[2], factors.shape[3]):
        row, col = ways.positions[sample, point, cell].double().numpy()
        row, col = np.clip(row, 0, rows - 1), np.clip(col, 0, cols - 1)
        i, j = min(int(row), rows - 2), min(int(col), cols - 2)
        a, b = row - i, col - j
        here = (1 - a) * (1 - b) * maps[:, :, i, j] + (1 - a) * b * maps[:, :, i, j + 1]
        here = here + a * (1 - b) * maps[:, :, i + 1, j] + a * b * maps[:, :, i + 1, j + 1]
        left = np.exp(-float(ways.ages[point]) / np.array([6.0, 20.0, 50.0]))
        expected[sample, :, cell] += left * (here @ factors[sample, :, point, cell].double().numpy())
    torch.testing.assert_close(found.double(), torch.from_numpy(expected).view(2, 3, rows, cols), rtol=1e-4, atol=1e-4)


def test_two_sources_and_a_lifetime_are_found_again_from_advection_without_noise(tiny: Store, transport: Transport) -> None:
    """What the layer itself makes of known maps, learned from nothing by its own gradient."""
    arch = architecture(tiny, ("one",))
    arch = Architecture(grid=arch.grid, variables=15, target_channels=(5,), sources=("one",))
    truth, learned = Sources(arch), Sources(arch)
    with torch.no_grad():
        truth.source_maps[0, 0, 6, 9], truth.source_maps[0, 0, 10, 20] = 1.0, 0.5
        truth.log_lifetime.fill_(math.log(14.0))
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.LBFGS(learned.parameters(), max_iter=400, history_size=50, line_search_fn="strong_wolfe")
    samples = []
    for _ in range(24):
        rows, cols = (torch.rand(2, generator=rng) * 1.6 - 0.8).tolist()
        ways = transport.ways(uniform(tiny, rows, cols, count=1), torch.tensor([24.0]))
        samples.append((transport.places(ways), transport.factors(ways, torch.zeros(1).double(), ["one"]), ways.ages, [9]))
    with torch.no_grad():
        goals = [truth(*sample) for sample in samples]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.stack([(learned(*s) - g).square().mean() for s, g in zip(samples, goals, strict=True)]).mean() * 1e4
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for _ in range(3):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    assert float(learned.log_lifetime.exp()) == pytest.approx(14.0, rel=0.02)
    both = torch.stack([truth.source_maps.detach()[0, 0].flatten(), learned.source_maps.detach()[0, 0].flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.95
    first, second = learned.source_maps.detach()[0, 0].flatten().topk(2).indices.tolist()
    assert {divmod(first, tiny.grid[1]), divmod(second, tiny.grid[1])} == {(6, 9), (10, 20)}
