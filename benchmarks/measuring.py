"""Medians of interleaved rounds, and peak memory of one call in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

Action = Callable[[], object]


def interleaved(actions: dict[str, Action], rounds: int) -> dict[str, list[float]]:
    """Seconds of every action, in turn, `rounds` times after one untimed call each."""
    for action in actions.values():
        action()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], a: str, b: str) -> float:
    """Median over rounds of a's time over b's."""
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))


def peak_gb(make: Callable[[], Action]) -> tuple[float, float]:
    """(whole process, what one call of what `make` returns adds) at their peak, GB; `make` must be picklable.

    The second call is measured: the first may create what lasts, as an optimizer's moments.
    """
    # The C library then gives memory back when it is freed, as far as new processes are concerned.
    with mock.patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="1000000"), multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (make, torch.get_num_threads()))


def _peak(make: Callable[[], Action], threads: int) -> tuple[float, float]:
    torch.set_num_threads(threads)
    action = make()
    action()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
    action()
    return _status("VmHWM"), _status("VmHWM") - before


def _status(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1e6
