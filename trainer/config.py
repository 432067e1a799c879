"""One typed tree for a run: YAML plus `key=value` overrides, validated wholly before anything starts.

Unknown keys are errors with a suggestion. A key that a choice elsewhere makes inert is an error too, so a value that
is written down is a value that acts; a test asserts that every field of the tree is read by the code.
One clock counts everything: optimizer steps.
"""

from __future__ import annotations

import math
import os
import re
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from data import Refusal
from data.variables import BY_NAME, MODEL_INPUTS, MODEL_TARGETS
from trainer.model.architecture import LEGACY_BIAS_FLOOR, Architecture


class ConfigError(Refusal):
    """The configuration is wrong; the message names the key and the remedy."""


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
    prefetch: int = Field(4, ge=0, description="micro-batches read ahead")
    splits: dict[Literal["train", "validation", "test"], Ranges] | None = Field(
        None, description="days, first and last, of every split, instead of the store's own; a list of such ranges, or one"
    )
    cache_dir: LocalPath | None = Field(None, description="on every node, a disk or memory that its ranks copy the store to")

    @model_validator(mode="after")
    def _check(self) -> Data:
        for names in (self.inputs, self.targets):
            if len(set(names)) != len(names):
                raise ValueError(f"a variable is listed twice in {names}")
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


class WindScan(Section):
    mode: Literal["none", "global", "regional", "legacy"] = "regional"
    cache: LocalPath | None = None

    @model_validator(mode="after")
    def _check(self) -> WindScan:
        uncached = self.mode in ("none", "legacy")
        if uncached and self.cache is not None:
            raise ValueError(f"wind_scan.cache is not read when wind_scan.mode is {self.mode}: remove it")
        if not uncached and self.cache is None:
            raise ValueError(f"wind_scan.mode {self.mode} needs wind_scan.cache (python -m data wind-scan STORE)")
        return self


class Model(Section):
    grid: tuple[int, int] = Field(description="pixels, rows and columns; must equal the store's")
    patch: int = Field(2, ge=1)
    width: int = Field(768, ge=4)
    depth: int = Field(6, ge=1)
    heads: int = Field(8, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    drop_path: float = Field(0.1, ge=0, lt=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    elevation_bias: bool = True
    alpha_init: float | None = None
    init_std: float = Field(0.02, gt=0, description="published value at width 768; 0.02 * sqrt(768 / width) elsewhere")
    recompute: Literal["none", "attention", "blocks"] = "none"

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.alpha_init is not None and not self.elevation_bias:
            raise ValueError("model.alpha_init is not read when model.elevation_bias is false: remove it")
        if self.grid[0] % self.patch or self.grid[1] % self.patch:
            raise ValueError(f"grid {self.grid} is not a whole number of {self.patch} x {self.patch} patches")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be divisible by heads ({self.heads}) and by 4")
        return self


class Optimizer(Section):
    lr: float = Field(5e-4, gt=0)
    alpha_lr: float = Field(1e-2, gt=0, description="rate of elevation_alpha, which has no weight decay")
    weight_decay: float = Field(1e-5, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = Field(1e-8, gt=0)
    clip: float = Field(1.0, gt=0, description="global gradient norm")


class Schedule(Section):
    warmup_steps: int = Field(0, ge=0)
    final_lr: float = Field(0.01, ge=0, le=1, description="rate at the last step, as a share of the peak")
    decay_steps: int | None = Field(None, ge=1, description="length of the cosine; default: the run's steps")


class Batch(Section):
    total: int = Field(8, ge=1, description="global batch: micro x accumulation x world size")
    micro: int = Field(1, ge=1)

    def accumulation(self, world_size: int) -> int:
        """Micro-batches a rank accumulates for one optimizer step.

        Raises:
            ConfigError: the global batch is not a multiple of micro x world size.
        """
        each = self.micro * world_size
        if self.total % each:
            below, above = self.total // each * each, math.ceil(self.total / each) * each
            near = " or ".join(str(x) for x in (below, above) if x)
            raise ConfigError(
                f"batch.total={self.total} is not micro ({self.micro}) x accumulation x world size ({world_size}). "
                f"Nearest possible: batch.total={near}."
            )
        return self.total // each


class Validation(Section):
    every: int = Field(100, ge=1)
    samples: int = Field(64, ge=1)


class Checkpointing(Section):
    every: int = Field(200, ge=1)
    keep_last: int = Field(3, ge=1)
    keep_every: int | None = Field(None, ge=1, description="also keep every step that is a multiple of this")


class Telemetry(Section):
    every: int = Field(10, ge=1, description="steps between status lines")
    wandb_project: str | None = None


class InitFrom(Section):
    """Foreign weights to start from; they load completely or not at all."""

    path: LocalPath
    allow_missing: list[str] = []


class Spikes(Section):
    """What to do when a step's loss is far above the usual; it is then looked at before every update."""

    policy: Literal["skip", "roll_back"]
    factor: float = Field(4.0, gt=1, description="a spike is a loss above factor x the running mean")
    horizon: int = Field(100, ge=2, description="steps over which the running mean forgets")
    most_roll_backs: int = Field(10, ge=1, description="in the whole life of the run; then it ends")


class Watch(Section):
    """Seconds that a phase may last on any rank before the run gives up (watchdog.py)."""

    rendezvous: float = Field(600.0, gt=0, description="until all ranks have met")
    first_collective: float = Field(300.0, gt=0)
    start: float = Field(1800.0, gt=0, description="opening data, loading weights or a checkpoint")
    first_batch: float = Field(300.0, gt=0)
    step: float = Field(600.0, gt=0)
    validation: float = Field(1800.0, gt=0)
    save: float = Field(1800.0, gt=0)


class Expect(Section):
    """What the validation loss must be before step 1, as of a checkpoint one continues from."""

    val_loss: float
    tolerance: float = Field(gt=0)


class Run(Section):
    run_dir: LocalPath
    steps: int = Field(ge=1)
    seed: int = Field(0, ge=0, lt=2**20)
    precision: Literal["fp32", "bf16"] = "fp32"
    resume: Literal["auto", "never"] = "auto"
    max_bad_steps: int = Field(5, ge=1, description="non-finite steps in a row before the run stops")
    data: Data
    wind_scan: WindScan = WindScan(mode="none")
    model: Model
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    batch: Batch = Batch()
    validation: Validation = Validation()
    checkpoint: Checkpointing = Checkpointing()
    telemetry: Telemetry = Telemetry()
    init_from: InitFrom | None = None
    spikes: Spikes | None = None
    expect: Expect | None = None
    watch: Watch = Watch()

    @model_validator(mode="after")
    def _check(self) -> Run:
        if self.schedule.warmup_steps >= (self.schedule.decay_steps or self.steps):
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} must be less than the schedule's length "
                f"({self.schedule.decay_steps or self.steps})"
            )
        if self.wind_scan.mode == "legacy" and self.data.inputs[:2] != ["u", "v"]:
            raise ValueError("wind_scan.mode legacy takes the wind from the first two inputs: they must be u, v")
        if self.wind_scan.mode == "legacy" and "elevation" not in self.data.inputs:
            raise ValueError("wind_scan.mode legacy reads the elevation among the inputs")
        return self

    def architecture(self) -> Architecture:
        """The network that this configuration describes."""
        own = self.model
        return Architecture(
            grid=own.grid,
            variables=len(self.data.inputs),
            target_channels=tuple(self.data.inputs.index(name) for name in self.data.targets),
            patch=own.patch,
            width=own.width,
            depth=own.depth,
            heads=own.heads,
            mlp_ratio=own.mlp_ratio,
            drop_path=own.drop_path,
            dropout=own.dropout,
            elevation_bias=own.elevation_bias,
            alpha_init=0.01 if own.alpha_init is None else own.alpha_init,
            init_std=own.init_std,
            bias_floor=LEGACY_BIAS_FLOOR if self.wind_scan.mode == "legacy" else None,
            recompute=own.recompute,
        )
