"""What a foreign file says of its network beside the weights, in words of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from data.given.pickles import Described, Inert
from data.variables import MODEL_INPUTS

# What others call a setting of ours, in the order in which they are believed.
WORDS = {
    "data.inputs": "variables in_variables in_vars input_variables input_vars default_vars inputs channels",
    "data.targets": "target_variables target_vars out_variables out_vars output_variables targets",
    "data.lead_hours": "lead_hours lead_times forecast_hours horizons",
    "model.grid": "img_size image_size grid",
    "model.patch": "patch_size patch",
    "model.heads": "num_heads n_heads heads",
}
LISTS = {"data.inputs": str, "data.targets": str, "data.lead_hours": int, "model.grid": int}
OPTIMIZING = ("optimizer", "callbacks", "loops", "lr_schedulers", "scheduler")
OURS = {re.sub(r"\W|_", "", name): name for name in MODEL_INPUTS}


def told_by(content: dict[Any, Any]) -> dict[str, list[Any]]:
    """Key of a configuration of ours -> what a file states of it, the most believed value first."""
    stated: dict[str, list[Any]] = {}
    for key, value in _plain(content):
        stated.setdefault(key.lower(), []).append(value)
    told = {}
    for setting, words in WORDS.items():
        values = [_as_ours(setting, x) for word in words.split() for x in stated.get(word, [])]
        told[setting] = [value for value in values if value is not None]
    return {setting: values for setting, values in told.items() if values}


def _as_ours(setting: str, value: Any) -> Any:
    """A value as ours are written; None for one that means something else."""
    if setting not in LISTS:
        if isinstance(value, list | tuple) and len(set(value)) == 1:  # of a square patch
            value = value[0]
        return value if type(value) is int else None
    items = list(value) if isinstance(value, list | tuple) else []
    if not items or any(type(item) is not LISTS[setting] for item in items):
        return None
    if LISTS[setting] is int:
        return items
    return [OURS.get(re.sub(r"\W|_", "", item.lower()), item) for item in items]


def _plain(tree: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(key, value) of everything but tensors, outermost first; of namespaces, what they hold."""
    tree = tree.held if isinstance(tree, Inert) else tree
    if not isinstance(tree, dict) or depth > 5:
        return
    inner = {key: _value(value) for key, value in tree.items() if isinstance(key, str)}
    yield from inner.items()
    for key, value in inner.items():
        if not key.startswith(OPTIMIZING) and not isinstance(value, Tensor | Described):
            yield from _plain(value, depth + 1)


def _value(value: Any) -> Any:
    """Values of OmegaConf lie in nodes, and those in `_content`."""
    held = value.held if isinstance(value, Inert) else {}
    content = held.get("_content")
    if isinstance(content, list):
        return [_value(item) for item in content]
    if isinstance(content, dict):
        return {key: _value(item) for key, item in content.items()}
    return held.get("_val", value)
