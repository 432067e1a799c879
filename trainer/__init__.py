"""Everything that learns: the model, the loop, checkpoints and the commands around them.

`from trainer import load_forecaster` is for scripts of one's own (docs/forecasting.ipynb).
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load_forecaster":  # imported when it is asked for: a command's --help must not cost torch and xarray
        from trainer.standalone import load_forecaster

        return load_forecaster
    raise AttributeError(f"module 'trainer' has no attribute '{name}'")
