"""Static fields that the files of several tests lie on."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr


@pytest.fixture(scope="session")
def static(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    file = tmp_path_factory.mktemp("static") / "static.nc"
    lat, lon = np.arange(25, 40.1, 0.25), np.arange(100, 122.1, 0.25)
    grid = np.zeros((len(lat), len(lon)))
    axes = {"lat": ("lat", lat, {"units": "degrees_north"}), "lon": ("lon", lon, {"units": "degrees_east"})}
    fields = {"z": 100 + 10 * (lat[:, None] - 32) + grid, "people": 200 + grid, "land": 1 + grid}
    xr.Dataset({name: (("lat", "lon"), values) for name, values in fields.items()}, axes).to_netcdf(file)
    return ["--elevation", f"{file}:z", "--population", f"{file}:people", "--land-mask", f"{file}:land"]
