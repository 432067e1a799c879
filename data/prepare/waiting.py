"""Fields that are converted with others, hour by hour: what is missing for want of them is said and remembered.

Mixing ratios take pressure and temperature, dew points the temperature, winds along a grid each other. A file is read once, so
what was converted without its partner stays missing, and a partner that comes later must not make it look complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from rich.console import Console

from data import DataError
from data.prepare.catalogue.catalogue import Catalogue
from data.store.layout import Store
from data.strict import parse_json

WAITING = "waiting.json"  # in the parts of a store, and in a finished one
Waiting = dict[str, list[str]]  # of a field: "with" what it is converted, "hours" at which that was not there


def note(parts: Path, catalogue: Catalogue, lacking: dict[str, np.ndarray], before: dict[str, Waiting]) -> None:
    """Say and remember which hours will be missing though their files are there."""
    console, waiting = Console(stderr=True), dict(before)
    for name, hours in lacking.items():
        needed = catalogue.converted_with(name, "grid")
        console.print(
            f"WARNING: '{name}' will be missing at {len(hours)} hours, first {hours[0]}: no file has the {_and(needed)} that "
            "it is converted with"
        )
        earlier = before[name]["hours"] if name in before else []
        waiting[name] = {"with": list(needed), "hours": earlier + [str(hour) for hour in hours]}
    if waiting:
        (parts / WAITING).write_text(json.dumps(waiting))


def waiting_in(store: Store) -> dict[str, Waiting]:
    """What a finished store remembers."""
    path = store.path / WAITING
    return parse_json(path.read_text(encoding="utf-8"), str(path)) if path.exists() else {}


def require_not_waited_for(catalogue: Catalogue, store: Store) -> None:
    """
    Raises:
        DataError: new files hold what fields of the store were waiting for, whose own files are not read again.
    """
    for name, about in waiting_in(store).items():
        for of in set(about["with"]) & catalogue.hours.keys():
            late = np.isin(catalogue.hours[of], np.array(about["hours"], "datetime64[h]"))
            if late.any():
                raise DataError(
                    f"the new files hold '{of}' at {catalogue.hours[of][late][0]}, for want of which '{name}' is missing in "
                    f"{store.path}; its own files were read before. Prepare all files together again."
                )


def lacking_in(catalogue: Catalogue, store: Store, winds: str) -> dict[str, np.ndarray]:
    """Fields of new files, and their hours that will be missing as what they are converted with has a gap.

    Raises:
        DataError: that may still come, or was read before.
    """
    air = [name for name in ("temp", "psfc") if name in store.contents.names("weather")]
    lacking = catalogue.incomplete(winds, hours_of(store, air))
    for name, hours in lacking.items():
        needed = catalogue.converted_with(name, winds)
        if np.isin(hours, hours_of(store, needed)).any():
            raise DataError(
                f"the new files hold '{name}' at {hours[0]}, and the {_and(needed)} that it is converted with were read "
                "before. Prepare all files together again."
            )
        last = min(max([*hours_of(store, [of])[-1:], *catalogue.hours.get(of, hours[:0])[-1:]]) for of in needed)
        if hours[-1] > last:
            raise DataError(
                f"the new files hold '{name}' up to {hours[-1]}, and the {_and(needed)} that it is converted with reach to "
                f"{last}: append these first, or with it."
            )
    return lacking


def hours_of(store: Store, names: Iterable[str]) -> np.ndarray:
    """Hours at which a store has any value of each of some variables."""
    there = np.ones(len(store.times), bool)
    for name in names:
        there &= store.missing[store.contents.group(name)][:, store.contents.channel(name)] < 1.0
    return store.times[there]


def _and(names: Iterable[str]) -> str:
    return " and ".join(names)
