"""The sources that a run has learned beside those of the simulation: a picture, and how well they agree.

`python -m benchmarks.physics_study.maps runs/demo --out docs/sources.png`
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import Normalize

from data.synthetic.atmosphere import LIFETIME_H, SPECIES, emissions
from trainer.forecaster import load_forecaster
from trainer.report.runs import aspect_of, draw_map, write
from trainer.report.sources import learned

SHOWN = (("pm25", "one"), ("so2", "one"), ("pm10", "dust"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    forecaster = load_forecaster(options.run)
    store, found = forecaster.dataset.store, learned(forecaster)
    cities, dust = emissions(store.lat, store.lon, store.static)
    truth = {(name, "one"): cities[SPECIES.index(name)] for name in SPECIES} | {("pm10", "dust"): dust, ("pm25", "dust"): dust}
    inside = store.static["domain_mask"] > 0
    for (name, factor), true in truth.items():
        ours = found[f"source_{name}"].sel(factor=factor).to_numpy()
        if true.any():
            correlation = np.corrcoef(true[inside], ours[inside])[0, 1]
            lifetime = float(found[f"lifetime_{name}"])
            print(
                f"{name:5s} {factor:5s} correlation {correlation:.2f}, lifetime {lifetime:.0f} h, true {LIFETIME_H[name]:.0f} h"
            )
    height = 3.6 * aspect_of(store) * np.ptp(store.lat) / np.ptp(store.lon)
    size = (3.8 * len(SHOWN), 2 * height + 0.6)
    figure, panels = plt.subplots(2, len(SHOWN), figsize=size, squeeze=False, layout="constrained")
    for column, (name, factor) in enumerate(SHOWN):
        maps = 3600.0 * truth[name, factor], found[f"source_{name}"].sel(factor=factor).to_numpy()
        for row, (title, field) in enumerate(zip(("true", "learned"), maps, strict=True)):
            most = float(np.quantile(np.abs(field), 0.995))
            draw_map(panels[row, column], store, field, norm=Normalize(-most, most), cmap="RdBu_r")
            panels[row, column].set(xticks=[], yticks=[], title=f"{name}, {factor}: {title}")
    write(figure, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
