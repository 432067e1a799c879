"""Run configuration + ds_configs/*.json -> DeepSpeed engine, optimizer groups, learning rate."""

from __future__ import annotations

import copy
import math
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data import DataError
from data.strict import parse_json
from trainer.checkpoint.same_run import FREE
from trainer.checkpoint.zero import shape_of
from trainer.config import ConfigError, Run, Schedule

# What of DeepSpeed's configuration is read: what says where and when, and a few keys that change numbers.
CHANGE_NUMBERS = ["communication_data_type", "prescale_gradients", "gradient_predivide_factor", "data_types"]
CHANGE_NUMBERS += ["seq_parallel_communication_data_type", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"]
DEEPSPEED_KEYS = sorted({*CHANGE_NUMBERS, *(key.partition(".")[0] for key in FREE["deepspeed"])})

# Beside everything with one dimension.
NO_DECAY = ("pos_embed", "var_embed", "var_query", "proj_biases", "analysis_weight", "relative_position", "scan_embed")


def learning_rate(peak: float, step: int, steps: int, schedule: Schedule) -> float:
    """Rate for optimizer step `step` (0-based): linear warm-up, then a cosine down to `final_lr` x peak."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    length = (schedule.decay_steps or steps) - schedule.warmup_steps
    progress = min(1.0, (step - schedule.warmup_steps) / length)
    return peak * (schedule.final_lr + (1 - schedule.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def freeze(model: nn.Module, run: Run) -> None:
    """Let the parameters that `freeze` names be: they get no gradient and no optimizer state.

    Raises:
        ConfigError: a pattern fits no parameter, or nothing is left to train.
    """
    for pattern in run.freeze:
        matched = [parameter for name, parameter in model.named_parameters() if re.fullmatch(pattern, name)]
        if not matched:
            names = ", ".join(list(dict(model.named_parameters()))[:6])
            raise ConfigError(f"freeze: '{pattern}' fits no parameter; they are called {names}, ...")
        for parameter in matched:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("freeze: nothing is left to train.")


def parameter_groups(model: nn.Module, run: Run) -> list[dict[str, Any]]:
    """AdamW groups: decay (matrices), no_decay (norms, biases, embeddings), elevation_alpha and sources (own rates)."""
    groups: dict[str, dict[str, Any]] = {
        "decay": {"params": [], "weight_decay": run.optimizer.weight_decay, "peak_lr": run.optimizer.lr},
        "no_decay": {"params": [], "weight_decay": 0.0, "peak_lr": run.optimizer.lr},
        "elevation_alpha": {"params": [], "weight_decay": 0.0, "peak_lr": run.optimizer.alpha_lr},
        "sources": {"params": [], "weight_decay": 0.0, "peak_lr": run.optimizer.sources_lr},
    }
    for name, parameter in ((name, p) for name, p in model.named_parameters() if p.requires_grad):
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "elevation_alpha":
            groups[leaf]["params"].append(parameter)
        elif leaf == "source_maps":
            groups["sources"]["params"].append(parameter)
        elif len(shape_of(parameter)) < 2 or leaf in NO_DECAY:
            groups["no_decay"]["params"].append(parameter)
        else:
            groups["decay"]["params"].append(parameter)
    return [{"name": name, "lr": group["peak_lr"], **group} for name, group in groups.items() if group["params"]]


def grouped_parameters(model: nn.Module, run: Run) -> dict[str, dict[str, Any]]:
    """Optimizer group and shape of every parameter, by name."""
    group_of = {id(p): group["name"] for group in parameter_groups(model, run) for p in group["params"]}
    return {name: {"group": group_of.get(id(p), "frozen"), "shape": list(shape_of(p))} for name, p in model.named_parameters()}


def dtype_of(run: Run) -> torch.dtype:
    """What the network computes in; masters are fp32 always."""
    return torch.bfloat16 if run.precision == "bf16" else torch.float32


def set_learning_rates(engine: Any, step: int, run: Run) -> float:
    """Set every group's rate for `step`; returns that of the first group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(group["peak_lr"], step, run.steps, run.schedule)
    return float(engine.optimizer.param_groups[0]["lr"])


def guard_plain_step(engine: Any) -> None:
    """Before a step without ZeRO: let the optimizer skip it if the averaged gradient is not finite.

    ZeRO's optimizers look themselves; plain AdamW takes a `found_inf` flag, on the device.
    """
    if engine.zero_optimization() or engine.bfloat16_enabled() or not engine.is_gradient_accumulation_boundary():
        return
    norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.optimizer.found_inf = (~torch.isfinite(norm)).float()
    engine.optimizer.grad_scale = None
    engine.optimizer.norm = norm


def step_was_skipped(engine: Any) -> bool:
    """True if the step just taken changed nothing because the gradient was not finite, alike on all ranks."""
    found = getattr(engine.optimizer, "found_inf", None)
    return bool(engine.optimizer.overflow) if found is None else bool(found)


def gradient_norm(engine: Any) -> float:
    """Global norm before clipping, of the last step."""
    found = getattr(engine.optimizer, "norm", None)
    return float(engine.get_global_grad_norm() if found is None else found)


def resolve_deepspeed(path: str | Path, run: Run, world_size: int) -> dict[str, Any]:
    """Read DeepSpeed's JSON and fill every "auto" from the run.

    Raises:
        ConfigError: absent file, unknown key, or a value that contradicts the run.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no DeepSpeed configuration at {path}. They lie in ds_configs/.")
    try:
        config = parse_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, DataError) as error:
        raise ConfigError(f"{path} cannot be used: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise ConfigError(f"{path} must be an object with settings of DeepSpeed, see ds_configs/zero1.json.")
    for key in config:
        if key not in DEEPSPEED_KEYS:
            near = get_close_matches(key, DEEPSPEED_KEYS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "optimizer and schedule belong in the run's configuration."
            raise ConfigError(f"{path}: '{key}' is not read; {hint}")
    decided: dict[str, Any] = {
        "train_batch_size": run.batch.total,
        "train_micro_batch_size_per_gpu": run.batch.micro,
        "gradient_accumulation_steps": run.batch.accumulation(world_size),
        "gradient_clipping": run.optimizer.clip,
    }
    for key, value in decided.items():
        if config.get(key, "auto") not in ("auto", value):
            raise ConfigError(f'{path}: {key}={config[key]} contradicts the run\'s {value}; write "auto" there.')
        config[key] = value
    stage = config.setdefault("zero_optimization", {}).setdefault("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"{path}: zero_optimization.stage={stage!r} is not 0, 1, 2 or 3.")
    if config["zero_optimization"].get("round_robin_gradients"):
        raise ConfigError(
            f"{path}: with zero_optimization.round_robin_gradients DeepSpeed 0.19.8 finds the state of another "
            "parameter under a parameter's name, so no checkpoint could be right: remove it."
        )
    bf16 = config.setdefault("bf16", {"enabled": "auto"})
    if not isinstance(bf16, dict):
        raise ConfigError(f'{path}: bf16 must be an object, as {{"enabled": "auto"}}.')
    if bf16.get("enabled", "auto") not in ("auto", run.precision == "bf16"):
        raise ConfigError(f'{path}: bf16.enabled={bf16["enabled"]} contradicts precision={run.precision}; write "auto".')
    bf16["enabled"] = run.precision == "bf16"
    return config


def build_engine(model: nn.Module, run: Run, deepspeed_config: dict[str, Any]) -> Any:
    """Wrap `model` in a DeepSpeed engine; its weights are put in afterwards, by checkpoint/state.py.

    Raises:
        ConfigError: DeepSpeed refuses its configuration.
    """
    import deepspeed

    settings = copy.deepcopy(deepspeed_config)
    zero = settings["zero_optimization"]
    offload = "offload_optimizer" in zero
    if offload:
        settings["zero_force_ds_cpu_optimizer"] = False
    exact = settings.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    unsharded_bf16 = zero["stage"] == 0 and run.precision == "bf16"
    if unsharded_bf16:
        settings.pop("data_types", None)  # DeepSpeed takes it with ZeRO only; torch does it below
    optimizer = torch.optim.AdamW(
        parameter_groups(model, run), lr=run.optimizer.lr, betas=run.optimizer.betas, eps=run.optimizer.eps, fused=not offload
    )
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise ConfigError(f"DeepSpeed refuses its configuration: {error}") from error
    engine.ema_decay = run.ema
    if unsharded_bf16 and exact:
        for parameter in engine.module.parameters():
            parameter.grad = None
            parameter.grad_dtype = torch.float32
    return engine
