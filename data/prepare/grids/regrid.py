"""Regridding by precomputed sparse weights: bilinear, and first-order conservative for downsampling.

The target is a regular grid of latitude and longitude; the source is regular or curvilinear. Longitudes may run
0..360 or -180..180 and latitudes up or down. Conservative weights are areas of overlap on the sphere (Jones 1999,
Mon. Wea. Rev. 127): in the coordinates (longitude, sine of latitude) a cell's area is that on the sphere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse
import shapely

from data import DataError
from data.prepare.grids.grid import Grid, edges, wrapped

NEEDED = 0.5  # a target cell with less than this share of valid source is missing
NEWTON_STEPS = 12  # bilinear coordinates inside a quadrilateral; 1 suffices for a parallelogram


@dataclass(frozen=True)
class Regridder:
    """weights: (target cells, source cells); a row sums to the share of the target cell that the source covers."""

    weights: scipy.sparse.csr_array
    shape: tuple[int, int]

    @property
    def covered(self) -> np.ndarray:
        """(h, w) bool: cells with enough source under them."""
        return np.reshape(self.weights.sum(1) >= NEEDED, self.shape)

    @cached_property
    def _whole(self) -> np.ndarray:
        """(target cells,) share of each that the source covers, summed as for fields with gaps; NaN where it is too small."""
        return self._enough(self.weights @ np.ones(self.weights.shape[1], "f4"))

    @staticmethod
    def _enough(share: np.ndarray) -> np.ndarray:
        return np.where(share >= NEEDED, share, np.float32(np.nan))

    def __call__(self, fields: np.ndarray) -> np.ndarray:
        """(T, H, W) float32, NaN where missing -> (T, h, w) float32, NaN where under half of a cell's source is valid."""
        out = np.empty((len(fields), self.weights.shape[0]), "f4")
        for field, regridded in zip(fields.reshape(len(fields), self.weights.shape[1]), out, strict=True):
            valid = np.isfinite(field)
            if valid.all():
                total, share = self.weights @ field, self._whole
            else:
                total = self.weights @ np.where(valid, field, np.float32(0))
                share = self._enough(self.weights @ valid.astype("f4"))
            np.divide(total, share, out=regridded)
        return out.reshape(len(fields), *self.shape)


def build(source: Grid, target: Grid, method: str) -> Regridder:
    """Weights from `source` to the regular grid `target`.

    Args:
        method: "bilinear" or "conservative".

    Raises:
        DataError: source and target do not overlap.
    """
    middle = float(target.lon.mean())
    if source.lat.ndim == 1:
        weights = _regular(source, target, method, middle)
    else:
        lon = middle + wrapped(source.lon - middle)
        weights = (_curvilinear_bilinear if method == "bilinear" else _curvilinear_conservative)(
            Grid(source.lat.astype("f8"), lon), target
        )
    regridder = Regridder(scipy.sparse.csr_array(weights, dtype="f4"), target.shape)
    if not regridder.covered.any():
        raise DataError(
            f"the source covers latitudes {source.lat.min():.2f} .. {source.lat.max():.2f} and longitudes "
            f"{source.lon.min():.2f} .. {source.lon.max():.2f}, no cell of the target ({target.lat.min():.2f} .. "
            f"{target.lat.max():.2f}, {target.lon.min():.2f} .. {target.lon.max():.2f}). Check --lat and --lon."
        )
    return regridder


def _regular(source: Grid, target: Grid, method: str, middle: float) -> scipy.sparse.csr_array:
    """Product of one-dimensional weights; columns are in the order of the file."""
    rows = np.argsort(source.lat, kind="stable")
    lon = middle + wrapped(source.lon.astype("f8") - middle)
    columns = np.argsort(lon, kind="stable")
    lat, lon = source.lat.astype("f8")[rows], lon[columns]
    if lon[-1] - lon[0] + 1.5 * (lon[1] - lon[0]) > 360.0:  # a whole circle: the cells of the seam have two neighbours
        columns = np.concatenate([columns[-1:], columns, columns[:1]])
        lon = np.concatenate([lon[-1:] - 360.0, lon, lon[:1] + 360.0])
    if method == "bilinear":
        along_lat, along_lon = _linear(lat, target.lat), _linear(lon, target.lon)
    else:
        sines = [np.sin(np.deg2rad(np.clip(edges(x), -90.0, 90.0))) for x in (lat, np.sort(target.lat))]
        along_lat = _overlap(*sines)
        if target.lat[0] > target.lat[-1]:
            along_lat = along_lat[::-1]
        along_lon = _overlap(edges(lon), edges(target.lon))
    kron = scipy.sparse.kron(scipy.sparse.csr_array(along_lat), scipy.sparse.csr_array(along_lon), format="coo")
    i, j = np.divmod(kron.col, len(columns))
    at = rows[i] * len(source.lon) + columns[j]
    return scipy.sparse.csr_array((kron.data, (kron.row, at)), shape=(kron.shape[0], len(source.lat) * len(source.lon)))


def _linear(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(target, source) weights between the two nearest ascending centres; constant in the outer half of the edge cells."""
    border = edges(source)
    left = np.clip(np.searchsorted(source, target, side="right") - 1, 0, len(source) - 2)
    share = np.clip((target - source[left]) / (source[left + 1] - source[left]), 0.0, 1.0)
    inside = (target >= border[0]) & (target <= border[-1])
    weights = np.zeros((len(target), len(source)))
    weights[np.arange(len(target)), left] = (1.0 - share) * inside
    weights[np.arange(len(target)), left + 1] = share * inside
    return weights


def _overlap(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(target, source) share of every target interval that a source interval covers; both given by ascending borders."""
    shared = np.minimum(target[1:, None], source[None, 1:]) - np.maximum(target[:-1, None], source[None, :-1])
    return np.asarray(np.maximum(shared, 0.0) / np.diff(target)[:, None])


def _curvilinear_conservative(source: Grid, target: Grid) -> scipy.sparse.csr_array:
    corners = [_corners(source.lon), np.sin(np.deg2rad(_corners(source.lat)))]
    cells = shapely.polygons(_quadrilaterals(np.stack(corners, -1)))
    lat, lon = np.sin(np.deg2rad(edges(target.lat))), edges(target.lon)
    south, north = np.minimum(lat[:-1], lat[1:]), np.maximum(lat[:-1], lat[1:])
    west, east = np.minimum(lon[:-1], lon[1:]), np.maximum(lon[:-1], lon[1:])
    boxes = shapely.box(west[None], south[:, None], east[None], north[:, None]).ravel()
    row, column = shapely.STRtree(cells).query(boxes, predicate="intersects")
    share = shapely.area(shapely.intersection(boxes[row], cells[column])) / shapely.area(boxes)[row]
    return scipy.sparse.csr_array((share, (row, column)), shape=(boxes.size, cells.size))


def _curvilinear_bilinear(source: Grid, target: Grid) -> scipy.sparse.csr_array:
    """Four weights a target point: its bilinear coordinates in the quadrilateral of centres around it."""
    rows, columns = source.shape
    centres = np.stack([source.lon, source.lat], -1)
    lon, lat = np.meshgrid(target.lon, target.lat)
    points = shapely.points(lon.ravel(), lat.ravel())
    inside, quad = shapely.STRtree(shapely.polygons(_quadrilaterals(centres))).query(points, predicate="intersects")
    inside, first = np.unique(inside, return_index=True)  # on a border the first of two is as good
    i, j = np.divmod(quad[first], columns - 1)
    a, b, c, d = centres[i, j], centres[i, j + 1], centres[i + 1, j + 1], centres[i + 1, j]
    wanted = np.stack([lon.ravel(), lat.ravel()], -1)[inside]
    along = np.full((2, len(inside)), 0.5)
    for _ in range(NEWTON_STEPS):
        s, t = along[..., None]
        error = (1 - s) * (1 - t) * a + s * (1 - t) * b + s * t * c + (1 - s) * t * d - wanted
        by_s, by_t = (1 - t) * (b - a) + t * (c - d), (1 - s) * (d - a) + s * (c - b)
        determinant = by_s[:, 0] * by_t[:, 1] - by_s[:, 1] * by_t[:, 0]
        along[0] -= (error[:, 0] * by_t[:, 1] - error[:, 1] * by_t[:, 0]) / determinant
        along[1] -= (by_s[:, 0] * error[:, 1] - by_s[:, 1] * error[:, 0]) / determinant
    s, t = np.clip(along, 0.0, 1.0)  # on an edge rounding may leave the cell
    weights = np.stack([(1 - s) * (1 - t), s * (1 - t), s * t, (1 - s) * t])
    at = np.stack([i * columns + j, i * columns + j + 1, (i + 1) * columns + j + 1, (i + 1) * columns + j])
    return scipy.sparse.csr_array((weights.ravel(), (np.tile(inside, 4), at.ravel())), shape=(lon.size, rows * columns))


def _corners(centres: np.ndarray) -> np.ndarray:
    """(H + 1, W + 1) corners as means of the four (H, W) centres around; the outer ring is extrapolated first."""
    wide = np.pad(centres, 1, mode="reflect", reflect_type="odd")
    return np.asarray((wide[:-1, :-1] + wide[1:, :-1] + wide[:-1, 1:] + wide[1:, 1:]) / 4)


def _quadrilaterals(points: np.ndarray) -> np.ndarray:
    """(H, W, 2) mesh points -> ((H - 1) * (W - 1), 4, 2) the cells between them, in raster order."""
    around = [points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]]
    return np.stack(around, axis=-2).reshape(-1, 4, 2)
