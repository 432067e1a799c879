"""A run from YAML and `key=value` overrides, and what is wrong with them in words."""

from __future__ import annotations

import copy
import importlib.util
import logging
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from data import DataError
from data.strict import parse_yaml
from trainer.config import ConfigError, Run

log = logging.getLogger("trainer")
# What users of other trainers write.
SYNONYMS = {
    "learning_rate": "optimizer.lr",
    "batch_size": "batch.total",
    "micro_batch_size": "batch.micro",
    "max_steps": "steps",
    "epochs": "steps",
    "warmup": "schedule.warmup_steps",
    "grad_clip": "optimizer.clip",
    "lead_times": "data.lead_hours",
}


def load(path: str | Path, overrides: list[str] | None = None) -> Run:
    """Read YAML, apply `key=value` overrides (values are YAML, keys dotted) and validate the whole tree.

    Raises:
        ConfigError: the file is absent or not YAML, or a key or value is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no configuration at {path}. Examples lie in launch/configs/.")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}).") from error
    except DataError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a mapping of keys, see launch/configs/demo.yaml.")
    _mean_own_directory(path, tree)
    return validate(tree, str(path), overrides)


def _mean_own_directory(path: Path, tree: dict[str, Any]) -> None:
    """The configuration that lies in a run directory is that of this run, also where the directory was moved or copied."""
    folder = path.absolute().parent
    if path.name != "config.yaml" or not (folder / "run.json").exists():
        return
    if Path(str(tree.get("run_dir"))).absolute() != folder:
        log.info("run_dir is %s, where %s lies, not %s", folder, path.name, tree.get("run_dir"))
    tree["run_dir"] = str(folder)


def validate(tree: dict[str, Any], source: str, overrides: list[str] | None = None) -> Run:
    """Build the typed tree from `tree` and the overrides; `source` names its origin in messages.

    Raises:
        ConfigError: listing every wrong key and value, with suggestions.
    """
    tree = copy.deepcopy(tree)  # of a checkpoint's manifest, which stays what it was
    try:
        given: dict[str, str] = {}
        for override in overrides or []:
            _apply(tree, override, given)
        return Run.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        raise ConfigError(f"{source} is not a valid run:\n" + "\n".join(f"  {line}" for line in lines)) from error
    except DataError as error:
        raise ConfigError(f"{source} is not a valid run:\n  {error}") from error


def require_wandb(run: Run) -> None:
    """
    Raises:
        ConfigError: a W&B project is asked for and the package is not there.
    """
    if run.telemetry.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("telemetry.wandb_project is set but wandb is not installed: pip install wandb")


def dump(run: Run) -> str:
    """The resolved configuration as YAML that `load` reads back."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def _apply(tree: dict[str, Any], override: str, given: dict[str, str]) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override '{override}' is not of the form key=value, as in batch.micro=2")
    for earlier, whole in given.items():
        if earlier == key or earlier.startswith(key + "."):
            raise ConfigError(f"override '{override}' would drop '{whole}', given before it: keep one of the two.")
    given[key] = override
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override '{override}': '{parent}' is a value, not a section")
    tree[last] = parse_yaml(text, f"override '{override}'")


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{where or 'configuration'}: {error['msg'].removeprefix('Value error, ')}"
    known = _dotted_keys(Run)
    section = where.rpartition(".")[0]
    here = {key.removeprefix(section + "."): key for key in known if key.rpartition(".")[0] == section}
    anywhere = {key.rpartition(".")[2]: key for key in known} | SYNONYMS
    written = str(error["loc"][-1])
    near = [names[m] for names in (here, anywhere) for m in get_close_matches(written, names, n=1, cutoff=0.7)]
    return f"{where}: unknown key; " + (f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(here)}")


def _dotted_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                keys += _dotted_keys(candidate, f"{prefix}{name}.")
    return keys
