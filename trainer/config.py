"""One typed tree for a run: YAML plus `key=value` overrides, validated wholly before anything starts.

Unknown keys are errors with a suggestion. A key that a choice elsewhere makes inert is an error too, so a value that
is written down is a value that acts; a test asserts that every field of the tree is read by the code.
One clock counts everything: optimizer steps.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from data import Refusal
from data.channels.channels import EVERY_H, OF_PATHS
from trainer.config_data import Data, LocalPath, Section, WindPaths, WindScan
from trainer.model.architecture import LEGACY_BIAS_FLOOR, Architecture


class ConfigError(Refusal):
    """The configuration is wrong; the message names the key and the remedy."""


def _direction(given: Any) -> Any:
    """Configurations of before there were two directions say true or false."""
    return {True: "descent", False: "none"}[given] if isinstance(given, bool) else given


class Model(Section):
    grid: tuple[int, int] = Field(description="pixels, rows and columns; must equal the store's")
    patch: int = Field(2, ge=1)
    width: int = Field(768, ge=4)
    depth: int = Field(6, ge=1)
    heads: int = Field(8, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    drop_path: float = Field(0.1, ge=0, lt=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    predict: Literal["state", "change"] = Field(
        "state", description="change: the analysis enters with a weight for each target and lead time, fitted, then learned"
    )
    elevation_bias: Annotated[Literal["none", "descent", "climb"], BeforeValidator(_direction)] = Field(
        "descent", description="what a query pays for: keys that are higher (the published formula), or lower; none"
    )
    alpha_init: float | None = None
    bias_floor: float | None = Field(None, lt=0, description="clamps the elevation bias; for networks of old code")
    elevation_as_given: bool = Field(False, description="the bias reads the normalised elevation among the inputs, not metres")
    relative_position: bool = Field(False, description="a learned bias by distance in the first block (release of 2026)")
    first_block_dropout: float = Field(0.0, ge=0, lt=1, description="of attention, projection and MLP of the first block")
    embedding_norm: bool = Field(False, description="a LayerNorm of every variable's token (release of 2026)")
    sources: list[Literal["one", "wind", "dust", "night", "season_cos", "season_sin"]] = Field(
        [], description="factors of the sources that are learned along the paths of the air (model/sources.py)"
    )
    init_std: float = Field(0.02, gt=0, description="published value at width 768; 0.02 * sqrt(768 / width) elsewhere")
    recompute: Literal["none", "attention", "blocks"] = "none"

    @model_validator(mode="after")
    def _check(self) -> Model:
        of_bias = {"alpha_init": self.alpha_init, "bias_floor": self.bias_floor, "elevation_as_given": self.elevation_as_given}
        inert = [name for name, value in of_bias.items() if value is not None and value is not False]
        if inert and self.elevation_bias == "none":
            raise ValueError(f"model.{inert[0]} is not read when model.elevation_bias is none: remove it")
        if self.grid[0] % self.patch or self.grid[1] % self.patch:
            raise ValueError(f"grid {self.grid} is not a whole number of {self.patch} x {self.patch} patches")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be divisible by heads ({self.heads}) and by 4")
        return self


class Optimizer(Section):
    lr: float = Field(5e-4, gt=0)
    alpha_lr: float = Field(1e-2, gt=0, description="rate of elevation_alpha, which has no weight decay")
    sources_lr: float = Field(1e-2, gt=0, description="rate of the maps of sources, which have no weight decay")
    weight_decay: float = Field(1e-5, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = Field(1e-8, gt=0)
    clip: float = Field(1.0, gt=0, description="global gradient norm")


class Loss(Section):
    """Of normalised errors; the mean over targets and the weighted area."""

    kind: Literal["squared", "absolute", "huber"] = "squared"
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field({}, description="of targets; 1 where none is given")


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
    """Weights to start from: of a run, an export or a foreign file; they load completely or not at all."""

    path: LocalPath
    raw: bool = Field(False, description="the weights themselves, also where a running mean of them is kept")
    take: str | None = Field(None, description="the name of the set to take from a file that holds several")
    channels: Literal["published", "configured"] | list[str] | None = Field(
        None, description="their order in a file that does not say: the published one, that of data.inputs, or a list"
    )
    allow_missing: list[str] = Field([], description="last parts of names of parameters that need not be there")
    allow_change: list[str] = Field([], description="keys, as wind_scan.mode, in which the weights may be made otherwise")


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
    freeze: list[str] = Field([], description="regular expressions of parameters that are not trained, as blocks.[0-3].*")
    ema: float | None = Field(None, gt=0, lt=1, description="decay a step of a running mean of the weights, which is scored")
    resume: Literal["auto", "never"] = "auto"
    max_bad_steps: int = Field(5, ge=1, description="non-finite steps in a row before the run stops")
    data: Data
    wind_scan: WindScan = WindScan(mode="none")
    wind_paths: WindPaths = WindPaths()
    model: Model
    optimizer: Optimizer = Optimizer()
    loss: Loss = Loss()
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
        unknown = [name for name in self.loss.weights if name not in self.data.targets]
        if unknown:
            raise ValueError(f"loss.weights {unknown} are not among data.targets")
        if self.wind_scan.of_old_code:
            self._require_old_inputs()
        self._require_paths()
        if self.wind_scan.mode == "legacy" and self.model.bias_floor is not None:
            raise ValueError(f"model.bias_floor is {LEGACY_BIAS_FLOOR} where wind_scan.mode is legacy: remove it")
        if self.elevation_as_given and "elevation" not in self.data.inputs:
            raise ValueError("the elevation bias is to read the elevation among the inputs: add it to data.inputs")
        return self

    @property
    def uses_paths(self) -> bool:
        """Whether anything is made of the paths of the air."""
        return bool(self.model.sources) or any(key in OF_PATHS for key in self.data.derived)

    def _require_paths(self) -> None:
        if self.uses_paths != (self.wind_paths.cache is not None):
            need = "need wind_paths.cache (python -m data wind-paths STORE --out CACHE)"
            unread = "wind_paths.cache is read by data.derived carried and exposure and by model.sources: remove it, or add one"
            raise ValueError(f"data.derived carried and exposure, and model.sources, {need}" if self.uses_paths else unread)
        uneven = [lead for lead in self.data.lead_hours if lead % EVERY_H]
        if self.uses_paths and uneven:
            raise ValueError(f"data.lead_hours {uneven}: paths of the air have a point every {EVERY_H} h, use multiples of it")
        if self.model.sources and self.data.transform:
            raise ValueError("model.sources add concentrations to concentrations: remove data.transform")
        if self.uses_paths and self.wind_scan.of_old_code:
            raise ValueError(f"wind_scan.mode {self.wind_scan.mode} is of the old code, which knows no paths of the air")

    def _require_old_inputs(self) -> None:
        mode = f"wind_scan.mode {self.wind_scan.mode}"
        if self.model.predict == "change":
            raise ValueError(f"{mode} is for networks of the old code, which predict the state")
        if self.data.inputs[:2] != ["u", "v"]:
            raise ValueError(f"{mode} takes the wind from the first two inputs: they must be u, v")

    @property
    def elevation_as_given(self) -> bool:
        """Whether the bias reads the elevation that is among the inputs, normalised."""
        return self.model.elevation_as_given or (self.wind_scan.mode == "legacy" and self.model.elevation_bias != "none")

    def architecture(self) -> Architecture:
        """The network that this configuration describes."""
        own = self.model
        return Architecture(
            grid=own.grid,
            variables=len(self.data.channels().names),
            target_channels=tuple(self.data.inputs.index(name) for name in self.data.targets),
            patch=own.patch,
            width=own.width,
            depth=own.depth,
            heads=own.heads,
            mlp_ratio=own.mlp_ratio,
            drop_path=own.drop_path,
            dropout=own.dropout,
            elevation_bias=own.elevation_bias,
            leads=tuple(self.data.lead_hours) if own.predict == "change" else (),
            alpha_init=0.01 if own.alpha_init is None else own.alpha_init,
            init_std=own.init_std,
            bias_floor=LEGACY_BIAS_FLOOR if self.wind_scan.mode == "legacy" else own.bias_floor,
            relative_position=own.relative_position,
            first_block_dropout=own.first_block_dropout,
            embedding_norm=own.embedding_norm,
            scan_added=self.wind_scan.positions == "add",
            sources=tuple(own.sources),
            recompute=own.recompute,
        )
