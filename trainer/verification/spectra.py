"""Power spectra on a limited area by the discrete cosine transform (Denis, Cote and Laprise 2002, Mon. Weather Rev. 130)."""

from __future__ import annotations

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from data.store.layout import Store

KM_PER_DEGREE = 111.195  # on a sphere of 6371 km


class Spectra:
    """The transform of one grid, and which scale each of its coefficients belongs to."""

    def __init__(self, store: Store, device: torch.device) -> None:
        rows, cols = store.grid
        self._along, self._across = (
            torch.from_numpy(scipy.fft.dct(np.eye(n), axis=0, norm="ortho")).float().to(device) for n in (rows, cols)
        )
        height = abs(store.lat[1] - store.lat[0]) * KM_PER_DEGREE
        width = abs(store.lon[1] - store.lon[0]) * KM_PER_DEGREE * np.cos(np.deg2rad(store.lat.mean()))
        northward, eastward = np.arange(rows) / (2 * rows * height), np.arange(cols) / (2 * cols * width)  # cycles per km
        wavenumber = np.hypot(northward[:, None], eastward[None])
        step = max(northward[1], eastward[1])
        band = np.round(wavenumber / step).astype(int)
        self.count = min(rows, cols) - 1
        member = torch.from_numpy((band[..., None] == np.arange(1, self.count + 1)).reshape(rows * cols, -1))
        self._member = member.float().to(device)
        self.wavelengths = (1.0 / (step * np.arange(1, self.count + 1))).tolist()  # km, of every band

    def of(self, fields: Tensor, known: Tensor) -> Tensor:
        """Variance in every band of scales, (B, T, bands) in the square of the units.

        Args:
            fields: (B, T, H, W); where not `known`, they count as their own mean, in forecast and truth alike.
        """
        inside = known.float()
        mean = torch.where(known, fields, 0.0).sum((-2, -1)) / inside.sum((-2, -1)).clamp(min=1.0)
        anomaly = torch.where(known, fields - mean[..., None, None], 0.0)
        coefficients = self._along @ anomaly @ self._across.T
        return (coefficients**2 / coefficients[0, 0].numel()).flatten(2) @ self._member
