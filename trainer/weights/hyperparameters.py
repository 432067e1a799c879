"""What a foreign file says of its network beside the weights, in words of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from data.variables import MODEL_INPUTS
from trainer.weights.pickles import Described, Inert

# What others call a setting of ours, in the order in which they are believed.
WORDS = {
    "data.inputs": (
        "variables",
        "in_variables",
        "in_vars",
        "input_variables",
        "input_vars",
        "default_vars",
        "inputs",
        "channels",
    ),
    "data.targets": ("target_variables", "target_vars", "out_variables", "out_vars", "output_variables", "targets"),
    "data.lead_hours": ("lead_hours", "lead_times", "forecast_hours", "horizons"),
    "model.grid": ("img_size", "image_size", "grid"),
    "model.patch": ("patch_size", "patch"),
    "model.heads": ("num_heads", "n_heads", "heads"),
}
LISTS = ("data.inputs", "data.targets", "data.lead_hours", "model.grid")
OPTIMIZING = ("optimizer", "callbacks", "loops", "lr_schedulers", "scheduler")
OURS = {re.sub(r"\W|_", "", name): name for name in MODEL_INPUTS}


def told_by(content: dict[Any, Any]) -> dict[str, list[Any]]:
    """Key of a configuration of ours -> values that a file's plain values state of it, the most believed one first."""
    stated: dict[str, list[Any]] = {}
    for key, value in _plain(content):
        stated.setdefault(key.lower(), []).append(value)
    told = {}
    for setting, words in WORDS.items():
        values = [_understood(setting, value) for word in words for value in stated.get(word, [])]
        told[setting] = [value for value in values if value is not None]
    return {setting: values for setting, values in told.items() if values}


def _understood(setting: str, value: Any) -> Any:
    """A value as ours are written; None for one that means something else."""
    if setting in LISTS:
        kind = str if setting in ("data.inputs", "data.targets") else int
        items = list(value) if isinstance(value, list | tuple) else []
        if not items or not all(isinstance(item, kind) and not isinstance(item, bool) for item in items):
            return None
        return [OURS.get(re.sub(r"\W|_", "", item.lower()), item) for item in items] if kind is str else items
    if isinstance(value, list | tuple) and len(set(value)) == 1:  # of a square patch
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _plain(tree: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(key, value) of everything that is no tensor, outermost first; of namespaces and the like, what they hold."""
    if isinstance(tree, Inert):
        tree = tree.held
    if not isinstance(tree, dict) or depth > 5:
        return
    inner = {key: _value(value) for key, value in tree.items() if isinstance(key, str)}
    yield from inner.items()
    for key, value in inner.items():
        if not key.startswith(OPTIMIZING) and not isinstance(value, Tensor | Described):
            yield from _plain(value, depth + 1)


def _value(value: Any) -> Any:
    """Values of OmegaConf lie in nodes."""
    held = value.held if isinstance(value, Inert) else {}
    if "_val" in held:
        return held["_val"]
    if isinstance(held.get("_content"), list):
        return [_value(item) for item in held["_content"]]
    if isinstance(held.get("_content"), dict):
        return {key: _value(item) for key, item in held["_content"].items()}
    return value
