"""The sets of weights that one file holds: a network's, the running mean of it, somebody's second network."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trainer.checkpoint.manifest import CheckpointError
from trainer.checkpoint.record import KEY, Record, parse
from trainer.weights.hyperparameters import told_by
from trainer.weights.pickles import Described, resolved

STATE_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
MEANS = {"ema", "swa", "average", "averaged", "avg", "shadow"}  # words in names of running means
UNAVERAGED = ("current_model_state", "online_model")  # what is beside a mean that is called like any weights
FEWEST = 10  # tensors of a set that lies beside another one
Named = dict[str, Tensor | Described]


@dataclass
class Sets:
    """Sets of named tensors by where they are, as "state_dict", the one that is usually meant first."""

    found: dict[str, Named]
    told: dict[str, list[Any]] = field(default_factory=dict)  # what the file says of its network (hyperparameters.py)
    record: Record | None = None  # of an export of ours

    def chosen(self, raw: bool, take: str | None = None) -> tuple[str, dict[str, Tensor]]:
        """Name and tensors of one set: the running mean where there is one, or the weights themselves.

        Args:
            take: the name of the set to take instead.

        Raises:
            CheckpointError: nothing tells which of several is meant, or there is no set of that name.
        """
        listed = ", ".join(repr(name) for name in self.found)
        if take is not None and take not in self.found:
            raise CheckpointError(f"there is no set of weights {take!r} in the file; there is {listed}.")
        names = [name for name in self.found if is_mean(name, self.found) != raw] or list(self.found)
        chosen = names[0] if take is None else take
        if take is None and len(names) > 1 and not _is_usual(chosen):
            raise CheckpointError(f"the file holds several sets of weights: {listed}. Name the one you mean with --take NAME.")
        return chosen, {name: resolved(value) for name, value in self.found[chosen].items()}


def is_mean(name: str, found: dict[str, Named]) -> bool:
    """Whether a set is the running mean of another one."""
    if name.split(".")[-1] in UNAVERAGED:
        return False
    called_so = MEANS & set(re.split(r"[._]", name.lower())) or "n_averaged" in found[name]
    return bool(called_so) or any(other.split(".")[-1] in UNAVERAGED for other in found)


def sets_in(content: Any) -> Sets:
    """Every set of weights in what a file holds, nested three times at most."""
    found: dict[str, Named] = {}
    _search(content, "", found)
    largest = max(map(len, found.values()), default=0)
    whole = {where: tensors for where, tensors in found.items() if len(tensors) >= min(FEWEST, largest)}
    split = {name: part for where, tensors in whole.items() for name, part in _twins(where, tensors).items()}
    ordered = sorted(split, key=lambda name: (not _is_usual(name), *_usual_first(name), -len(split[name])))
    told = told_by(content) if isinstance(content, dict) else {}
    record = content.get(KEY) if isinstance(content, dict) else None
    described = parse(record, "the file") if isinstance(record, str) else None
    return Sets({name: split[name] for name in ordered}, told, described)


def _search(tree: Any, where: str, found: dict[str, Named], depth: int = 0) -> None:
    if not isinstance(tree, dict) or where.split(".")[0].startswith("optimizer"):
        return
    tensors = {k: v for k, v in tree.items() if isinstance(k, str) and isinstance(v, (Tensor, Described))}
    if tensors:
        found[where] = tensors
    for key, value in tree.items() if depth < 3 else ():
        _search(value, f"{where}.{key}".lstrip("."), found, depth + 1)


def _twins(where: str, tensors: Named) -> dict[str, Named]:
    """One state dict, or the sets of equal names that lie in it under prefixes, as `net.` and `ema.`."""
    groups: dict[str, Named] = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        groups.setdefault(first, {})[rest] = tensor
    large = {first: group for first, group in groups.items() if len(group) >= FEWEST}
    alike = [first for first, group in large.items() if sum(group.keys() == other.keys() for other in large.values()) > 1]
    if alike:
        return {f"{where}.{first}".lstrip("."): groups[first] for first in alike}
    nested = _twins(where, groups[next(iter(large))]) if len(large) == len(groups) == 1 else {}
    return nested if len(nested) > 1 else {where: tensors}


def _is_usual(name: str) -> bool:
    return name.split(".")[-1] in ("", *STATE_KEYS)


def _usual_first(name: str) -> tuple[bool, ...]:
    return tuple(name.split(".")[-1] != key for key in STATE_KEYS)
