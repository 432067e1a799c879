"""A forecast as a CF dataset."""

from __future__ import annotations

import xarray as xr
from torch import Tensor

from trainer.forecaster import Forecaster


def to_dataset(forecaster: Forecaster, hour: int, lead_hours: list[int], fields: Tensor) -> xr.Dataset:
    """(L, T, H, W) ug m-3 -> CF dataset with lead time, latitude and longitude."""
    store = forecaster.dataset.store
    coordinates = {
        "lead_time": ("lead_time", lead_hours, {"standard_name": "forecast_period", "units": "hours"}),
        "time": store.times[hour].astype("datetime64[ns]"),
        "lat": ("lat", store.lat, {"standard_name": "latitude", "units": "degrees_north"}),
        "lon": ("lon", store.lon, {"standard_name": "longitude", "units": "degrees_east"}),
    }
    variables = {}
    for channel, name in enumerate(forecaster.dataset.normalizer.targets):
        variable = store.contents.variable(name)
        about = {"units": variable.units, "standard_name": variable.standard_name}
        variables[name] = (("lead_time", "lat", "lon"), fields[:, channel].cpu().numpy(), about)
    which = f"step {forecaster.manifest.step}, weights {forecaster.which}"
    attributes = {"Conventions": "CF-1.11", "source": f"{forecaster.checkpoint}, {which}"}
    attributes |= {f"{name}_fingerprint": value for name, value in forecaster.dataset.fingerprints().items()}
    return xr.Dataset(variables, coordinates, attributes)
