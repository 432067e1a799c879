"""What of a run's configuration says which data it reads, and what is made of them."""

from __future__ import annotations

import os
import re
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from data.channels.channels import Channels
from data.variables import BY_NAME, MODEL_INPUTS, MODEL_TARGETS


def _expanded(path: Path) -> Path:
    """Absolute at once, since a run directory is read from elsewhere too; `~` and `$VAR` mean what a shell makes of them."""
    text = os.path.expandvars(os.path.expanduser(path))
    unset = re.search(r"\$(\w+|\{\w+\})", text)
    if unset:
        raise ValueError(f"{path}: the environment variable {unset[0]} is not set")
    if "\0" in text:
        raise ValueError(f"{text!r} is not a path")
    return Path(text).absolute()


def _ranges(given: Any) -> Any:
    """A split may be one range of days or a list of them."""
    one = isinstance(given, list) and len(given) == 2 and not any(isinstance(day, list | tuple) for day in given)
    return [given] if one else given


LocalPath = Annotated[Path, AfterValidator(_expanded)]


Ranges = Annotated[list[tuple[date, date]], BeforeValidator(_ranges), Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    store: LocalPath
    inputs: list[str] = list(MODEL_INPUTS)
    targets: list[str] = list(MODEL_TARGETS)
    lead_hours: list[int] = Field([12, 24, 48, 96], min_length=1)
    history: list[int] = Field([], description="hours before the analysis at which all inputs with time are given again")
    future: list[str] = Field([], description="variables that are given at the valid time: perfect (analysed) weather")
    transform: dict[str, Literal["log1p"]] = Field({}, description="pollutants that are given and predicted as log(1 + x)")
    derived: list[Literal["sun", "day", "carried", "exposure"]] = Field(
        [], description="sun at both times; season; the analysis carried along the wind; people on the way of the air"
    )
    prefetch: int = Field(4, ge=0, description="micro-batches read ahead")
    splits: dict[Literal["train", "validation", "test"], Ranges] | None = Field(
        None, description="days, first and last, of every split, instead of the store's own; a list of such ranges, or one"
    )
    cache_dir: LocalPath | None = Field(None, description="on every node, a disk or memory that its ranks copy the store to")

    @model_validator(mode="after")
    def _check(self) -> Data:
        for names in (self.inputs, self.targets, self.future, self.derived, self.history):
            if len(set(names)) != len(names):
                raise ValueError(f"something is listed twice in {names}")
        if any(back < 1 for back in self.history):
            raise ValueError(f"history {self.history} counts hours before the analysis: each must be at least 1")
        unused = [name for name in self.transform if name not in self.inputs]
        if unused:
            raise ValueError(f"transform {unused} is not among the inputs")
        polluted = [name for name in self.future if name in BY_NAME and BY_NAME[name].group in ("chemistry", "static")]
        if polluted:
            raise ValueError(f"future {polluted} are what is to be forecast, or do not change: future is for weather")
        other = [t for t in self.targets if t in BY_NAME and BY_NAME[t].group != "chemistry"]
        if other:
            raise ValueError(f"targets {other} are not pollutants; possible: {', '.join(MODEL_TARGETS)}")
        absent = [t for t in self.targets if t not in self.inputs]
        if absent:
            raise ValueError(f"targets {absent} must also be inputs: the network predicts its input channels")
        if len(set(self.lead_hours)) != len(self.lead_hours) or min(self.lead_hours) < 1:
            raise ValueError(f"lead_hours {self.lead_hours} must be different and at least 1")
        if self.splits is not None:
            self._require_splits(self.splits)
        return self

    def channels(self) -> Channels:
        """What the network is given."""
        return Channels(self.inputs, self.history, self.future, self.derived, tuple(self.transform), self.targets)

    def days(self) -> dict[str, list[tuple[str, str]]] | None:
        """First and last day of every range of every split that the run chooses."""
        if self.splits is None:
            return None
        return {name: [(str(first), str(last)) for first, last in ranges] for name, ranges in self.splits.items()}

    @staticmethod
    def _require_splits(splits: dict[Any, Ranges]) -> None:
        absent = [name for name in ("train", "validation") if name not in splits]
        if absent:
            raise ValueError(f"splits must have {' and '.join(absent)}")
        ranges = sorted((first, last, name) for name, days in splits.items() for first, last in days)
        for (first, last, name), (after, _, other) in zip(ranges, [*ranges[1:], (date.max, date.max, "")], strict=True):
            if last < first:
                raise ValueError(f"splits.{name}: {first} .. {last} ends before it begins")
            if after <= last:
                raise ValueError(f"splits.{name} {first} .. {last} overlaps splits.{other}, which begins at {after}")


class WindPaths(Section):
    cache: LocalPath | None = Field(None, description="where the air comes from (python -m data wind-paths STORE)")


class WindScan(Section):
    mode: Literal["none", "global", "regional", "legacy", "release"] = "regional"
    cache: LocalPath | None = None
    positions: Literal["replace", "add"] = Field(
        "replace", description="take the patches' own positions away, as published, or add a second table, which starts at zero"
    )

    @model_validator(mode="after")
    def _check(self) -> WindScan:
        if self.positions == "add" and (self.mode == "none" or self.of_old_code):
            raise ValueError(f"wind_scan.positions is not read when wind_scan.mode is {self.mode}: remove it")
        uncached = self.mode == "none" or self.of_old_code
        if uncached and self.cache is not None:
            raise ValueError(f"wind_scan.cache is not read when wind_scan.mode is {self.mode}: remove it")
        if not uncached and self.cache is None:
            raise ValueError(f"wind_scan.mode {self.mode} needs wind_scan.cache (python -m data wind-scan STORE)")
        return self

    @property
    def of_old_code(self) -> bool:
        """Whether tokens move and nothing follows them, as in the published checkpoint and in the release of 2026."""
        return self.mode in ("legacy", "release")
