"""How a run is doing, from its files alone, from any machine, while it runs."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.command_line import clock, console
from data.process import locks
from data.strict import parse_yaml
from trainer.checkpoint import store
from trainer.checkpoint.manifest import CheckpointError
from trainer.scores.strength import judged

TAIL_BYTES = 1 << 17
RECENT = 20  # training rows
EXAMPLES = "  python -m trainer status runs/china"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path)


def run(options: argparse.Namespace) -> None:
    from rich.table import Table

    table = Table("what", "how it is", title=str(options.run_dir))
    for row in look(options.run_dir):
        table.add_row(*row)
    console(120).print(table)


def look(run_dir: Path) -> list[tuple[str, str]]:
    """(what, how it is) of a run.

    Raises:
        CheckpointError: nothing was ever trained in `run_dir`.
    """
    if not (run_dir / "config.yaml").exists():
        raise CheckpointError(f"{run_dir} is not a run: it has no config.yaml.")
    config = parse_yaml((run_dir / "config.yaml").read_text(errors="replace"), str(run_dir / "config.yaml"))
    if not isinstance(config, dict) or not isinstance(config.get("steps"), int):
        raise CheckpointError(f"{run_dir}/config.yaml is damaged: it states no steps.")
    rows = _last_rows(run_dir / "metrics.jsonl")
    training = [row for row in rows if row["kind"] == "train"]
    found = [("state", _state(run_dir, config, training))]
    if training:
        last = training[-1]
        alpha = f"{last['elevation_alpha']:+.4f}" if "elevation_alpha" in last else "no bias"
        found += [
            ("step", f"{last['step']} of {config['steps']}, {_age(time.time() - last['time'])} ago"),
            ("loss", f"{last['loss']:.4f}"),
            ("rate", f"{last['samples_per_s']:.1f} samples/s, MFU {100 * last['mfu']:.0f} %"),
            ("ETA", _eta(training, config["steps"])),
            ("waiting for data", f"{100 * last['data_wait_share']:.1f} %"),
            ("slowest rank", f"{last.get('slowest_rank', '-')}, {last.get('slowest_over_mean', 1.0):.2f} x the mean"),
            ("elevation_alpha", " ".join(filter(None, [alpha, judged(training)]))),
        ]
    validated = [row for row in rows if row["kind"] == "validation"]
    if validated:
        found.append(("validation", f"{validated[-1]['loss']:.4f} at step {validated[-1]['step']}"))
    newest, told = store.newest(run_dir), "none"
    if newest is not None:
        seconds = time.time() - (newest / "manifest.json").stat().st_mtime
        told = f"{newest.name}, {_age(seconds)} old"
    found.append(("last checkpoint", told))
    if (run_dir / "bad_samples.jsonl").exists():
        steps = {row["step"] for row in _last_rows(run_dir / "bad_samples.jsonl")}
        found.append(("bad steps", f"{len(steps)} skipped, the last at {max(steps, default=0)}"))
    if (run_dir / "watchdog/report.txt").exists():
        report = run_dir / "watchdog/report.txt"
        found.append(("watchdog", f"{_age(time.time() - report.stat().st_mtime)} ago: {report.read_text().strip()}"))
    for path in sorted((run_dir / "errors").glob("rank-*.log")):
        lines = path.read_text().strip().splitlines()
        if lines:
            age = _age(time.time() - path.stat().st_mtime)
            found.append((f"last error of {path.stem}", f"{next(x for x in reversed(lines) if x[:4].isdigit())} ({age} ago)"))
    return found


def _state(run_dir: Path, config: dict[str, Any], training: list[dict[str, Any]]) -> str:
    holder = locks.holder(run_dir / "lock")
    if holder is not None:
        return f"running, as {holder}"
    if training and training[-1]["step"] >= config["steps"]:
        return "finished"
    written = run_dir / "metrics.jsonl"
    if not written.exists():
        return "never trained a step"
    return f"nothing new for {_age(time.time() - written.stat().st_mtime)}: not running"


def _eta(training: list[dict[str, Any]], steps: int) -> str:
    recent = training[-RECENT:]
    if len(recent) < 2:
        return "unknown yet"
    a_step = (recent[-1]["time"] - recent[0]["time"]) / max(1, recent[-1]["step"] - recent[0]["step"])
    return clock(a_step * (steps - recent[-1]["step"]))


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """Whole rows at the end of a JSONL file that may be growing."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    whole = lines[1 if path.stat().st_size > TAIL_BYTES else 0 : -1]  # the last is empty, or being written
    rows = []
    for line in whole:
        with suppress(ValueError):  # a kill may have cut a row short
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and {"kind", "step"} <= row.keys() | {"kind"}]


def _age(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else clock(seconds)
