"""Which channels the network is given, and which hours of which groups are read for them.

Beside the variables at t there may be earlier analyses (`pm25@-6h`), weather at the valid time (`u@+lead`), and what
follows from time and place (`sun`, `day_sin`). They are more channels of the same embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from data.variables import PUBLISHED, Contents

DERIVED = {"sun": ("sun", "sun@+lead"), "day": ("day_sin", "day_cos"), "exposure": ("exposure@24h", "exposure@6h")}
EVERY_H = 3  # hours between the points of a path of the air
OF_PATHS = ("carried", "exposure")  # what is derived of the paths of the air; carried is a channel a target
STATIC = PUBLISHED.names("static")


@dataclass(frozen=True)
class Read:
    """A group of the store at one hour of every sample: `back` hours before t, or at the valid time (None)."""

    group: str
    back: int | None = 0

    @property
    def key(self) -> str:
        return self.group if self.back == 0 else named(self.group, self.back)


@dataclass(frozen=True)
class Channels:
    """What is given, in the order of the network's inputs: at t, then earlier, then later, then derived."""

    inputs: Sequence[str]
    history: Sequence[int] = ()  # hours back, each more than 0
    future: Sequence[str] = ()  # read at the valid time
    derived: Sequence[str] = ()  # keys of DERIVED, and "carried"
    logarithmic: Sequence[str] = ()  # variables that are given and predicted as log(1 + x)
    targets: Sequence[str] = ()  # whose analysis is carried

    @cached_property
    def with_time(self) -> list[str]:
        """Inputs that change from hour to hour."""
        return [name for name in self.inputs if name not in STATIC]

    @cached_property
    def names(self) -> list[str]:
        earlier = [named(name, back) for back in self.history for name in self.with_time]
        later = [named(name, None) for name in self.future]
        names = DERIVED | {"carried": tuple(f"{name}@departure" for name in self.targets)}
        return [*self.inputs, *earlier, *later, *(name for key in self.derived for name in names[key])]

    @cached_property
    def stored(self) -> list[tuple[str, int | None]]:
        """(variable, hours back or None) of every channel that is read: all but the derived ones."""
        earlier = [(name, back) for back in self.history for name in self.with_time]
        return [*((name, 0) for name in self.inputs), *earlier, *((name, None) for name in self.future)]

    def reads(self, held: Contents) -> tuple[Read, ...]:
        """What is read for every sample, beside the truth: groups with time, and chemistry, in which forecasts are scored."""
        found = {Read("chemistry"): None}
        for name, back in self.stored:
            if name not in STATIC:
                found[Read(held.group(name), back)] = None
        order = {group: place for place, group in enumerate(held.dynamic)}
        return tuple(sorted(found, key=lambda read: (read.back is None, read.back or 0, order[read.group])))


def named(name: str, back: int | None) -> str:
    """A variable or group at another hour than t."""
    return f"{name}@+lead" if back is None else f"{name}@-{back}h"
