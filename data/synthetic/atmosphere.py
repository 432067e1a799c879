"""A small physical simulation of weather and six pollutants.

Weather is a mean westerly flow plus travelling waves of a stream function with slowly wandering amplitudes,
slowed by land and turned along the contours where it meets a climb. Six pollutants are emitted by real cities with
a diurnal cycle, carried by that wind (first-order upwind, finite volumes), held back where the air must climb,
diffused and deposited; NO2 and O3 exchange by a minimal photolysis / titration cycle, dust is lifted from dry land.
It is a test bed whose forecasts need advection, terrain and chemistry, not a model of any real day.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from data.synthetic.recipe import Recipe
from data.variables import PUBLISHED

EARTH_RADIUS = 6.371e6  # m
SPECIES = PUBLISHED.names("chemistry")
# ug m-3: air that flows in over the boundary, and what deposition relaxes to.
BACKGROUND = dict(zip(SPECIES, (10.0, 18.0, 2.0, 3.0, 120.0, 70.0), strict=True))
# ug m-3 h-1 in the densest cities, before the diurnal cycle.
EMISSION = dict(zip(SPECIES, (11.0, 14.0, 5.0, 9.0, 130.0, 0.0), strict=True))
LIFETIME_H = dict(zip(SPECIES, (40.0, 24.0, 20.0, 14.0, 120.0, 48.0), strict=True))
DIFFUSIVITY = 4.0e3  # m2 s-1
WAVES = 14
GAPS = 0.25  # share of the flux that finds a pass however high the climb


def emissions(lat: np.ndarray, lon: np.ndarray, static: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What cities emit before the diurnal cycle, (6, H, W), and what dry land gives at its strongest, (H, W), ug m-3 s-1."""
    density = np.log1p(static["population"].astype("f8") / 40.0)
    cities = density / density.max()
    rate = np.array([EMISSION[s] for s in SPECIES])[:, None, None]
    desert = np.exp(-(((lat[:, None] - 41.0) / 4.5) ** 2) - ((lon[None] - 95.0) / 14.0) ** 2)
    dry = static["land_fraction"].astype("f8") * desert * (density < 0.5)
    return rate * cities / 3600.0, dry * 60.0 / 3600.0


class Atmosphere:
    """The state of the simulation: wave amplitudes and (6, H, W) concentrations in ug m-3."""

    def __init__(self, lat: np.ndarray, lon: np.ndarray, static: dict[str, np.ndarray], recipe: Recipe) -> None:
        self.recipe, self.lat, self.lon = recipe, lat, lon
        self.elevation = static["elevation"].astype("f8")
        self.land = static["land_fraction"].astype("f8")
        self.rng = np.random.default_rng([recipe.seed, 0])
        self.dy = EARTH_RADIUS * np.deg2rad(abs(lat[0] - lat[1]))
        self.dx = EARTH_RADIUS * np.deg2rad(lon[1] - lon[0]) * np.cos(np.deg2rad(lat))[:, None]
        self.x = EARTH_RADIUS * np.deg2rad(lon - lon.mean())[None] * np.cos(np.deg2rad(lat.mean()))
        self.y = EARTH_RADIUS * np.deg2rad(lat - lat.mean())[:, None]
        self._prepare_terrain()
        self.emission, self.dust = emissions(lat, lon, static)
        self._prepare_waves()
        background = np.array([BACKGROUND[s] for s in SPECIES])[:, None, None]
        self.background = background
        self.concentration = np.broadcast_to(background, (6, *self.elevation.shape)).copy()
        self.lifetime_s = 3600.0 * np.array([LIFETIME_H[s] for s in SPECIES])[:, None, None]
        spin_up = np.datetime64(recipe.start, "h") - 72
        for hour in range(72):
            self.advance_one_hour(spin_up + hour)

    def _prepare_terrain(self) -> None:
        smooth = gaussian_filter(self.elevation, 1.0, mode="nearest")
        north, east = -np.gradient(smooth, axis=0) / self.dy, np.gradient(smooth, axis=1) / self.dx
        slope = np.hypot(north, east) + 1e-12
        self.uphill = (east / slope, north / slope)
        self.deflection = 0.8 * (1.0 - np.exp(-slope / 0.004))
        self.friction = 0.62 - 0.22 * self.land
        # What a climb lets through, per face; row 0 is the northern edge.
        rise_east = np.diff(self.elevation, axis=1)
        rise_south = np.diff(self.elevation, axis=0)
        self.pass_east, self.pass_west = self._passing(rise_east), self._passing(-rise_east)
        self.pass_south, self.pass_north = self._passing(rise_south), self._passing(-rise_south)

    def _passing(self, rise: np.ndarray) -> np.ndarray:
        """Fraction of the flux that passes a face where the ground rises by `rise` metres; gaps let some through."""
        climb = np.maximum(rise, 0.0) / 1000.0
        return GAPS + (1.0 - GAPS) * np.exp(-self.recipe.blocking * climb)

    def _prepare_waves(self) -> None:
        wavelength = self.rng.uniform(1.6e6, 4.5e6, WAVES)
        heading = self.rng.uniform(-1.1, 1.1, WAVES)  # most of the variation runs west to east
        self.wavenumber = 2 * np.pi / wavelength * np.stack([np.cos(heading), np.sin(heading)])
        self.frequency = self.wavenumber[0] * self.rng.uniform(5.0, 11.0, WAVES)
        self.scale = 8.0 / np.sqrt(WAVES) * np.sqrt(2.0) / np.hypot(*self.wavenumber)  # m2 s-1: 8 m s-1 rms
        self.amplitude = self.rng.standard_normal((2, WAVES))
        self.phase = self.wavenumber[0][:, None, None] * self.x + self.wavenumber[1][:, None, None] * self.y

    def advance_one_hour(self, time: np.datetime64) -> tuple[np.ndarray, np.ndarray]:
        """Fields at `time` as ((5, H, W) weather, (6, H, W) chemistry), after which the state moves on by one hour."""
        weather, sun = self._weather(time)
        analysis = self.concentration.astype("f4")
        u, v = weather[0], weather[1]
        courant = (np.abs(u) / self.dx + np.abs(v) / self.dy).max() * 3600.0
        substeps = int(np.ceil(courant / 0.8)) + 1
        for _ in range(substeps):
            self._transport(u, v, 3600.0 / substeps)
        self._emit_react_deposit(weather, sun, 3600.0, time)
        decay = np.exp(-1.0 / 72.0)
        self.amplitude = decay * self.amplitude + np.sqrt(1 - decay**2) * self.rng.standard_normal((2, WAVES))
        return weather.astype("f4"), analysis

    def _weather(self, time: np.datetime64) -> tuple[np.ndarray, np.ndarray]:
        seconds = float((time - np.datetime64("2000-01-01T00", "h")).astype(int)) * 3600.0
        season = np.cos(2 * np.pi * (seconds / 86400.0 - 20.0) / 365.25)  # 1 in mid-January
        phase = self.phase - (self.frequency * seconds)[:, None, None]
        cosine, sine = np.cos(phase), np.sin(phase)
        a, b = self.amplitude * self.scale
        stream = np.tensordot(a, cosine, 1) + np.tensordot(b, sine, 1)
        along = np.tensordot(self.wavenumber * b, cosine, 1) - np.tensordot(self.wavenumber * a, sine, 1)
        lat = self.lat[:, None]
        u = -along[1] + 3.0 + 3.0 * season * np.clip((lat - 20.0) / 25.0, 0, 1)
        v = along[0] - 1.5 * season
        climbing = np.maximum(u * self.uphill[0] + v * self.uphill[1], 0.0) * self.deflection
        u = (u - climbing * self.uphill[0]) * self.friction
        v = (v - climbing * self.uphill[1]) * self.friction

        solar_hour = (seconds / 3600.0 + self.lon[None] / 15.0) % 24.0
        declination = np.deg2rad(-23.4 * season)
        latitude = np.deg2rad(lat)
        sun = np.sin(latitude) * np.sin(declination) - np.cos(latitude) * np.cos(declination) * np.cos(
            np.pi * solar_hour / 12.0
        )
        sun = np.maximum(sun, 0.0)
        coriolis = 2 * 7.292e-5 * np.sin(latitude)
        warm = v * 0.5 + stream / 2.5e6
        temp = (
            302.0 - 0.55 * (lat - 10.0) * (1 + 0.35 * season) - 0.0060 * self.elevation + warm + 6.0 * self.land * (sun - 0.25)
        )
        psfc = (101_325.0 + 1.2 * coriolis * stream) * np.exp(-self.elevation / 8200.0)
        rh = 62.0 + 18.0 * (1 - self.land) - 22.0 * (sun - 0.25) + 2.2 * v - 0.004 * self.elevation
        return np.stack([u, v, temp, np.clip(rh, 5.0, 100.0), psfc]), sun

    def _transport(self, u: np.ndarray, v: np.ndarray, seconds: float) -> None:
        """Upwind finite volumes; a climb holds back part of the flux.

        Converging air leaves upward with what it carries, diverging air is replaced by clean air from above.
        """
        c = np.pad(self.concentration, ((0, 0), (1, 1), (1, 1)), mode="edge")
        c[:, [0, -1], :] = self.background
        c[:, :, [0, -1]] = self.background
        here = self.concentration
        east, west, south, north = c[:, 1:-1, 2:], c[:, 1:-1, :-2], c[:, 2:, 1:-1], c[:, :-2, 1:-1]
        face_u = np.pad((u[:, 1:] + u[:, :-1]) / 2, ((0, 0), (1, 1)), mode="edge")
        face_s = -np.pad((v[1:] + v[:-1]) / 2, ((1, 1), (0, 0)), mode="edge")  # positive southward
        open_e, open_w = (np.pad(p, ((0, 0), (1, 1)), constant_values=1.0) for p in (self.pass_east, self.pass_west))
        open_s, open_n = (np.pad(p, ((1, 1), (0, 0)), constant_values=1.0) for p in (self.pass_south, self.pass_north))
        into_e, into_w = np.maximum(face_u, 0), np.maximum(-face_u, 0)
        into_s, into_n = np.maximum(face_s, 0), np.maximum(-face_s, 0)
        change = (
            (into_e * open_e)[:, :-1] * west
            - (into_e * open_e)[:, 1:] * here
            + (into_w * open_w)[:, 1:] * east
            - (into_w * open_w)[:, :-1] * here
        ) / self.dx + (
            (into_s * open_s)[:-1] * north
            - (into_s * open_s)[1:] * here
            + (into_n * open_n)[1:] * south
            - (into_n * open_n)[:-1] * here
        ) / self.dy
        divergence = np.diff(face_u, axis=1) / self.dx + np.diff(face_s, axis=0) / self.dy
        diffusion = DIFFUSIVITY * ((east + west - 2 * here) / self.dx**2 + (south + north - 2 * here) / self.dy**2)
        vertical = np.where(divergence > 0, divergence * self.background, divergence * here)
        self.concentration = np.maximum(here + seconds * (change + vertical + diffusion), 0.0)

    def _emit_react_deposit(self, weather: np.ndarray, sun: np.ndarray, seconds: float, time: np.datetime64) -> None:
        c = self.concentration
        solar_hour = (float(time.astype("datetime64[h]").astype(int)) + self.lon[None] / 15.0) % 24.0
        traffic = 0.7 + 0.5 * np.exp(-(((solar_hour - 8.0) / 2.5) ** 2)) + 0.6 * np.exp(-(((solar_hour - 19.0) / 3.0) ** 2))
        shallow = 1.0 / (0.6 + 1.1 * sun)  # a night boundary layer dilutes less
        c += seconds * self.emission * traffic * shallow
        speed = np.hypot(weather[0], weather[1])
        lifted = seconds * self.dust * np.clip((speed - 4.0) / 4.0, 0.0, 2.0) ** 2
        c[SPECIES.index("pm10")] += lifted
        c[SPECIES.index("pm25")] += 0.15 * lifted

        no2, o3 = SPECIES.index("no2"), SPECIES.index("o3")
        photolysed = c[no2] * (1.0 - np.exp(-seconds * 2.5e-5 * sun))
        titrated = np.minimum(c[o3] * (1.0 - np.exp(-seconds * 1.2e-6 * c[no2])), 0.5 * c[o3])
        c[no2] -= 0.5 * photolysed
        c[o3] += 3.0 * photolysed - titrated
        wet = 1.0 + 1.5 * np.clip((weather[3] - 80.0) / 20.0, 0.0, 1.0)
        keep = np.exp(-seconds * wet / self.lifetime_s)
        self.concentration = self.background + (c - self.background) * keep
