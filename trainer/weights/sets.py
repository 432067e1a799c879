"""The sets of weights in one file: a network's, its running mean, somebody's second network."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from data.given.pickles import Described, resolved
from trainer.checkpoint.manifest import CheckpointError
from trainer.checkpoint.record import KEY, Record, parse
from trainer.weights.hyperparameters import told_by

STATE_KEYS = ["", "state_dict", "model_state_dict", "model", "module", "net", "network", "weights"]
STATE_KEYS += ["params"]
MEANS = {"ema", "swa", "average", "averaged", "avg", "shadow"}  # words in names of running means
UNAVERAGED = ("current_model_state", "online_model")  # beside a mean without a name of its own
FEWEST = 10  # tensors of a set that lies beside another one
Named = dict[str, Tensor | Described]


@dataclass
class Sets:
    """Sets of named tensors by where they are, as "state_dict", the usual one first."""

    found: dict[str, Named]
    told: dict[str, list[Any]] = field(default_factory=dict)  # see hyperparameters.py
    record: Record | None = None  # of an export of ours

    def chosen(self, raw: bool, take: str | None = None) -> tuple[str, dict[str, Tensor]]:
        """Name and tensors of one set: the running mean where there is one, or the weights.

        Args:
            take: the name of the set to take instead.

        Raises:
            CheckpointError: nothing tells which is meant, or there is none of that name.
        """
        listed = ", ".join(repr(name) for name in self.found)
        fitting = [name for name in self.found if self._is_mean(name) != raw] or list(self.found)
        chosen = fitting[0] if take is None else take
        if chosen not in self.found:
            raise CheckpointError(f"there is no set of weights {take!r}; there is {listed}.")
        if take is None and len(fitting) > 1 and _place(chosen) == len(STATE_KEYS):
            raise CheckpointError(f"several sets of weights: {listed}. Name one with --take NAME.")
        return chosen, {name: resolved(value) for name, value in self.found[chosen].items()}

    def _is_mean(self, name: str) -> bool:
        if name.split(".")[-1] in UNAVERAGED:
            return False
        called_so = MEANS & set(re.split(r"[._]", name.lower()))
        beside = any(other.split(".")[-1] in UNAVERAGED for other in self.found)
        return bool(called_so) or beside or "n_averaged" in self.found[name]


def sets_in(content: Any) -> Sets:
    """Every set of weights in what a file holds, nested three times at most."""
    found: dict[str, Named] = {}
    _search(content, "", found)
    least = min(FEWEST, max(map(len, found.values()), default=0))
    whole = {where: tensors for where, tensors in found.items() if len(tensors) >= least}
    split: dict[str, Named] = {}
    for where, tensors in whole.items():
        split |= _twins(where, tensors)
    usual_first = sorted(split, key=lambda name: (_place(name), -len(split[name])))
    tree = content if isinstance(content, dict) else {}
    record = parse(tree[KEY], "the file") if isinstance(tree.get(KEY), str) else None
    return Sets({name: split[name] for name in usual_first}, told_by(tree), record)


def _search(tree: Any, where: str, found: dict[str, Named], depth: int = 0) -> None:
    if not isinstance(tree, dict) or where.startswith("optimizer"):
        return
    named = {key: value for key, value in tree.items() if isinstance(key, str)}
    tensors = {key: x for key, x in named.items() if isinstance(x, Tensor | Described)}
    if tensors:
        found[where] = tensors
    for key, value in tree.items() if depth < 3 else ():
        _search(value, f"{where}.{key}".lstrip("."), found, depth + 1)


def _twins(where: str, tensors: Named) -> dict[str, Named]:
    """One state dict, or the sets of equal names in it under prefixes, as `net.` and `ema.`."""
    groups: dict[str, Named] = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        groups.setdefault(first, {})[rest] = tensor
    large = [first for first, group in groups.items() if len(group) >= FEWEST]
    for first in large:
        alike = [other for other in large if groups[other].keys() == groups[first].keys()]
        if len(alike) > 1:
            return {f"{where}.{name}".lstrip("."): groups[name] for name in alike}
    nested = _twins(where, groups[large[0]]) if len(large) == len(groups) == 1 else {}
    return nested if len(nested) > 1 else {where: tensors}


def _place(name: str) -> int:
    """How usual a name is for the weights that are meant."""
    last = name.split(".")[-1]
    return STATE_KEYS.index(last) if last in STATE_KEYS else len(STATE_KEYS)
