"""What tests of preparation share: static fields, and no pictures."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import xarray as xr


@pytest.fixture(autouse=True, scope="module")
def without_pictures() -> Iterator[None]:
    """That of a store takes two seconds, most of a small preparation; commands in processes of their own draw theirs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("data.store.picture.draw", lambda store: store.path.with_suffix(".png"))
        yield


@pytest.fixture(scope="session")
def static(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    file = tmp_path_factory.mktemp("static") / "static.nc"
    lat, lon = np.arange(25, 40.1, 0.25), np.arange(100, 122.1, 0.25)
    grid = np.zeros((len(lat), len(lon)))
    axes = {"lat": ("lat", lat, {"units": "degrees_north"}), "lon": ("lon", lon, {"units": "degrees_east"})}
    fields = {"z": 100 + 10 * (lat[:, None] - 32) + grid, "people": 200 + grid, "land": 1 + grid}
    xr.Dataset({name: (("lat", "lon"), values) for name, values in fields.items()}, axes).to_netcdf(file)
    return ["--elevation", f"{file}:z", "--population", f"{file}:people", "--land-mask", f"{file}:land"]
