"""What a check is given, and what it says."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from data import Refusal
from trainer.config import Run
from trainer.dataset import Dataset
from trainer.model.topoflow import TopoFlow
from trainer.process import launch

REFUSED = (Refusal, OSError, torch.OutOfMemoryError)
REMEDIES: dict[type, str] = {torch.OutOfMemoryError: "a smaller batch.micro, or model.recompute: blocks"}


class Failed(Exception):
    """A check did not pass: what was found, and what to do."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.remedy = remedy


@dataclass
class Subject:
    """What is examined; each check leaves something for those after it, which name it as a need."""

    options: argparse.Namespace
    world: launch.Joined
    run: Run = field(init=False)  # as examined here: one rank, its batch alone
    asked: Run = field(init=False)  # as the job will run it
    dataset: Dataset = field(init=False)
    model: TopoFlow = field(init=False)
    engine: Any = field(init=False)
    deepspeed: dict[str, Any] = field(init=False)


@dataclass(frozen=True)
class Result:
    check: str
    state: Literal["pass", "FAIL", "skipped"]
    found: str
    remedy: str = ""
    seconds: float = 0.0
