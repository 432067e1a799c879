"""Wind caches of the old code: read without executing anything, compared with ours, and turned into one of ours.

`wind_scanner_cache.pkl` holds {grid_h, grid_w, num_sectors, regions_h, regions_w, sector_angles, cached_orders {sector:
LongTensor(N)}, regional_cached_orders {region: {sector: LongTensor(P)}}}. Its hash means nothing (a pickled tensor embeds
storage pointers), so what is compared is the orders.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import DataError
from data.given.pickles import Harmful, read_plain
from data.store.layout import DAMAGE
from data.wind_scan.cache import read_orders
from data.wind_scan.orders import Geometry, order_along_wind


@dataclass(frozen=True)
class OrderTables:
    """Order tables of any origin."""

    source: Path
    global_orders: np.ndarray  # (S, N)
    regional_orders: np.ndarray  # (R, S, P); R = 1 where one table serves all regions
    geometry: Geometry

    def differences(self, other: OrderTables) -> list[tuple[int, int]]:
        """Tokens that stand elsewhere in the other's orders: (global, regional) for each sector.

        Raises:
            DataError: the tables are for different grids, regions or numbers of sectors.
        """
        regions = max(len(self.regional_orders), len(other.regional_orders))
        shape = (regions, *self.regional_orders.shape[1:])
        if self.global_orders.shape != other.global_orders.shape or shape[1:] != other.regional_orders.shape[1:]:
            raise DataError(
                f"{self.source} has orders {self.global_orders.shape} and {self.regional_orders.shape[1:]} (sectors, tokens), "
                f"{other.source} has {other.global_orders.shape} and {other.regional_orders.shape[1:]}: not comparable."
            )
        globally = (self.global_orders != other.global_orders).sum(1)
        regional = (np.broadcast_to(self.regional_orders, shape) != np.broadcast_to(other.regional_orders, shape)).sum((0, 2))
        return [(int(a), int(b)) for a, b in zip(globally, regional, strict=True)]


def ours(like: OrderTables, aspect: float) -> OrderTables:
    """Our tables for the same grid, regions and sectors, on cells that are `aspect` times as high as wide."""
    g = like.geometry
    geometry = Geometry(g.grid, g.patch, g.regions, g.sectors, aspect, g.north_first)
    regional = order_along_wind(*g.region_patches, geometry)[None]
    return OrderTables(Path("our tables"), order_along_wind(*g.patches, geometry), regional, geometry)


def read_tables(path: Path) -> OrderTables:
    """Order tables of an old pickle (a file) or of one of our caches (a directory).

    Raises:
        DataError: absent, damaged, of another format, or a pickle that holds more than tensors.
    """
    if path.is_dir():
        geometry, global_orders, regional_orders = read_orders(path)
        return OrderTables(path, global_orders, regional_orders[None], geometry)
    content = _read_pickle(path)
    expected = {
        "grid_h": int,
        "grid_w": int,
        "num_sectors": int,
        "regions_h": int,
        "regions_w": int,
        "cached_orders": dict,
        "regional_cached_orders": dict,
    }
    for name, kind in expected.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), kind):
            raise DataError(f"{path} is not a wind cache of the old code: it has no {kind.__name__} '{name}'.")
    rows, cols, sectors = content["grid_h"], content["grid_w"], content["num_sectors"]
    regions = (content["regions_h"], content["regions_w"])
    # The old code scaled rows and columns to -1 .. 1, each by the whole grid.
    geometry = Geometry((2 * rows, 2 * cols), 2, regions, sectors, (cols - 1) / (rows - 1), True)
    try:
        global_orders = np.stack([content["cached_orders"][s].numpy() for s in range(sectors)])
        tables = [content["regional_cached_orders"][r] for r in range(regions[0] * regions[1])]
        regional_orders = np.stack([[table[s].numpy() for s in range(sectors)] for table in tables])
    except (KeyError, AttributeError, ValueError) as error:
        raise DataError(f"{path} lacks an order, or orders differ in length: {error!r}.") from error
    for orders in (global_orders, regional_orders):
        if not (np.sort(orders, -1) == np.arange(orders.shape[-1])).all():
            raise DataError(f"{path} holds an order that is not a permutation: the file is damaged.")
    return OrderTables(path, global_orders.astype("i4"), regional_orders.astype("i4"), geometry)


def one_regional_table(tables: OrderTables) -> np.ndarray:
    """(S, P): the table that all regions share.

    Raises:
        DataError: regions have different orders, which our format does not hold.
    """
    first = tables.regional_orders[0]
    others = np.flatnonzero((tables.regional_orders != first).any((1, 2)))
    if len(others):
        raise DataError(
            f"{tables.source}: regions {others[:8].tolist()} have other orders than region 0: it cannot be imported."
        )
    return first


def _read_pickle(path: Path) -> Any:
    try:
        return read_plain(path)
    except FileNotFoundError as error:
        raise DataError(f"no wind cache at {path}.") from error
    except (pickle.UnpicklingError, Harmful) as error:
        raise DataError(f"{path} holds more than tensors and is not opened: {error}.") from error
    except DAMAGE as error:
        raise DataError(f"{path} is damaged: {error!r}.") from error
