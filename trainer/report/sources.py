"""The sources that a network has learned along the paths of the air: as a CF dataset, and drawn.

They are what explains the training data along these paths, with the factors that were chosen: no inventory of emissions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.colors import Normalize

from trainer.forecaster import Forecaster
from trainer.report.runs import aspect_of, draw_map, spread, write
from trainer.report.scores import LABELS

MEANING = "what explains the training data along the paths of the air, multiplied by the factor; not an inventory"


def learned(forecaster: Forecaster) -> xr.Dataset:
    """Maps (factor, lat, lon) of every target in ug m-3 h-1, and lifetimes in hours, of a network with sources."""
    layer, dataset = forecaster.model.sources, forecaster.dataset
    assert layer is not None
    names, store = dataset.normalizer.targets, dataset.store
    maps = layer.source_maps.detach().float() * dataset.normalizer.target_std[:, None]
    coordinates = {
        "factor": list(forecaster.run.model.sources),
        "lat": ("lat", store.lat, {"standard_name": "latitude", "units": "degrees_north"}),
        "lon": ("lon", store.lon, {"standard_name": "longitude", "units": "degrees_east"}),
    }
    variables: dict[str, Any] = {
        f"source_{name}": (
            ("factor", "lat", "lon"),
            maps[channel].cpu().numpy(),
            {"units": "ug m-3 h-1", "long_name": f"learned source of {name}"},
        )
        for channel, name in enumerate(names)
    }
    lifetimes = layer.log_lifetime.detach().float().exp().tolist()
    for name, lifetime in zip(names, lifetimes, strict=True):
        variables[f"lifetime_{name}"] = ((), np.float32(lifetime), {"units": "h", "long_name": f"lifetime of {name}"})
    source = f"{forecaster.checkpoint}, step {forecaster.manifest.step}, weights {forecaster.which}"
    return xr.Dataset(variables, coordinates, {"Conventions": "CF-1.11", "source": source, "comment": MEANING})


def plot_sources(forecaster: Forecaster, out: Path) -> None:
    """A map for each target and factor, one scale a target; the learned lifetime stands beside."""
    found, store = learned(forecaster), forecaster.dataset.store
    names, factors = forecaster.dataset.normalizer.targets, found["factor"].to_numpy().tolist()
    height = 3.6 * aspect_of(store) * np.ptp(store.lat) / np.ptp(store.lon)
    size = (3.6 * len(factors) + 1.2, height * len(names) + 0.6)
    figure, panels = plt.subplots(len(names), len(factors), figsize=size, squeeze=False, layout="constrained")
    for row, name in enumerate(names):
        maps = found[f"source_{name}"].to_numpy()
        most = spread(np.abs(maps), 0.0, 0.995)[1]
        for column, factor in enumerate(factors):
            image = draw_map(panels[row, column], store, maps[column], norm=Normalize(-most, most), cmap="RdBu_r")
            panels[row, column].set(xticks=[], yticks=[])
            if row == 0:
                panels[row, column].set_title(factor)
        lifetime = float(found[f"lifetime_{name}"])
        panels[row, 0].set_ylabel(f"{LABELS.get(name, name)}\nlifetime {lifetime:.0f} h")
        figure.colorbar(image, ax=list(panels[row]), shrink=0.85, label="ug m-3 h-1", extend="both")
    write(figure, out)
