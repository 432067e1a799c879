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
OVERLAP = 0.01  # share of a cell that rounding and the curvature of edges may cover twice
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
    def used(self) -> np.ndarray:
        """(source cells,) bool: those that reach the target."""
        touched = np.zeros(self.weights.shape[1], bool)
        touched[self.weights.indices[self.weights.data != 0]] = True
        return touched

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
        along = _curvilinear_bilinear if method == "bilinear" else _curvilinear_conservative
        weights = along(Grid(source.lat.astype("f8"), source.lon.astype("f8")), target)
    total = weights.sum(1)
    if total.size and total.max() > 1.0 + OVERLAP:
        raise DataError(
            f"cells of the source overlap: {int((total > 1.0 + OVERLAP).sum())} cells of the "
            "target are covered up to "
            f"{total.max():.2f} times. Cut the part of the grid that is there twice (`cdo "
            "selindexbox`)."
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
    """Areas of overlap, without the twins of cells that a grid repeats at its seam."""
    corners = np.stack([_corners(source.lon), _corners(source.lat)], -1)
    place = np.round(np.stack([wrapped(source.lon), source.lat], -1).reshape(-1, 2), 6)
    numbers = np.arange(source.lat.size)
    first = np.unique(place, axis=0, return_index=True)[1]
    quads, numbers = _placed(_quadrilaterals(corners), numbers, np.isin(numbers, first), target)
    quads[..., 1] = np.sin(np.deg2rad(np.clip(quads[..., 1], -90.0, 90.0)))
    cells = shapely.polygons(quads)
    lat, lon = np.sin(np.deg2rad(edges(target.lat))), edges(target.lon)
    south, north = np.minimum(lat[:-1], lat[1:]), np.maximum(lat[:-1], lat[1:])
    west, east = np.minimum(lon[:-1], lon[1:]), np.maximum(lon[:-1], lon[1:])
    boxes = shapely.box(west[None], south[:, None], east[None], north[:, None]).ravel()
    row, column = shapely.STRtree(cells).query(boxes, predicate="intersects")
    share = shapely.area(shapely.intersection(boxes[row], cells[column])) / shapely.area(boxes)[row]
    return scipy.sparse.csr_array((share, (row, numbers[column])), shape=(boxes.size, source.lat.size))


def _curvilinear_bilinear(source: Grid, target: Grid) -> scipy.sparse.csr_array:
    """Four weights a target point: its bilinear coordinates in the quadrilateral of centres around it."""
    at, centres = np.arange(source.lat.size).reshape(source.shape), np.stack([source.lon, source.lat], -1)
    steps = abs(wrapped(np.diff(source.lon, axis=1)))
    if np.nanmedian(abs(wrapped(source.lon[:, 0] - source.lon[:, -1]))) <= 1.5 * np.nanmedian(steps):  # around the globe
        at, centres = (np.concatenate([each, each[:, :1]], axis=1) for each in (at, centres))
    of_quads, there = _quadrilaterals(at[..., None])[..., 0], np.ones((at.shape[0] - 1) * (at.shape[1] - 1), bool)
    quads, numbers = _placed(_quadrilaterals(centres), np.arange(len(there)), there, target)
    lon, lat = np.meshgrid(target.lon, target.lat)
    points = shapely.points(lon.ravel(), lat.ravel())
    inside, quad = shapely.STRtree(shapely.polygons(quads)).query(points, predicate="intersects")
    inside, first = np.unique(inside, return_index=True)  # on a border the first of two is as good
    a, b, c, d = quads[quad[first]].transpose(1, 0, 2)
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
    columns = of_quads[numbers[quad[first]]].T
    return scipy.sparse.csr_array((weights.ravel(), (np.tile(inside, 4), columns.ravel())), shape=(lon.size, source.lat.size))


def _placed(quads: np.ndarray, numbers: np.ndarray, there: np.ndarray, target: Grid) -> tuple[np.ndarray, np.ndarray]:
    """(n, 4, 2) quadrilaterals of longitude and latitude around the target, and their numbers.

    Each is whole, on whichever side of a seam its corners are stated; one that reaches over the
    edge of the circle around the target stands on both sides. Those without a place (NaN), or wider
    than half of the circle, are none.
    """
    middle, quads = float(target.lon.mean()), quads.copy()
    quads[..., 0] = quads[:, :1, 0] + wrapped(quads[..., 0] - quads[:, :1, 0])
    quads[..., 0] -= 360.0 * np.round((quads[..., 0].mean(1, keepdims=True) - middle) / 360.0)
    width = quads[..., 0].max(1) - quads[..., 0].min(1)
    real = there & np.isfinite(quads).all((1, 2)) & (width < 180.0)
    quads, numbers = quads[real], numbers[real]
    parts = [(quads, numbers)]
    for beyond, shift in ((quads[..., 0].max(1) > middle + 180.0, -360.0), (quads[..., 0].min(1) < middle - 180.0, 360.0)):
        parts.append((quads[beyond] + [shift, 0.0], numbers[beyond]))
    return np.concatenate([q for q, _ in parts]), np.concatenate([n for _, n in parts])


def _corners(centres: np.ndarray) -> np.ndarray:
    """(H + 1, W + 1) corners as means of the four (H, W) centres around; the outer ring is extrapolated first.

    Differences of degrees are those on the circle, so that no mean is taken across a seam.
    """
    for _ in range(2):
        before = centres[:1] - wrapped(centres[1:2] - centres[:1])
        after = centres[-1:] - wrapped(centres[-2:-1] - centres[-1:])
        centres = np.concatenate([before, centres, after]).T
    first = centres[:-1, :-1]
    others = (centres[1:, :-1], centres[:-1, 1:], centres[1:, 1:])
    return np.asarray(first + sum(wrapped(other - first) for other in others) / 4)


def _quadrilaterals(points: np.ndarray) -> np.ndarray:
    """(H, W, n) mesh points -> ((H - 1) * (W - 1), 4, n) the cells between them, in raster order."""
    around = [points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]]
    return np.stack(around, axis=-2).reshape(-1, 4, points.shape[-1])
