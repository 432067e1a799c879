"""What a rank imports before its first line of work, against torch and DeepSpeed alone: python -m benchmarks.imports

Processor time, interleaved; modules and opened files beside it, since every rank opens each of them on a shared file system.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PAIRS = 9
BASELINE = "import torch, deepspeed"
RANK = "import torch, deepspeed, trainer.train"
COUNT = "; import sys; print(len(sys.modules))"


def start(code: str, *under: str) -> tuple[float, int]:
    """(seconds of processor, modules) of a python that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [*under, sys.executable, "-c", code + COUNT]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, int(done.stdout.splitlines()[-1])


def opened(code: str) -> int | None:
    """Files that were opened, by strace; None where there is none."""
    if shutil.which("strace") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        start(code, "strace", "-f", "-qq", "-e", "trace=open,openat", "-o", str(log))
        lines = log.read_text(errors="replace").splitlines()
        return sum("O_DIRECTORY" not in line and " = -1 " not in line for line in lines)


def main() -> None:
    pairs = [(start(BASELINE)[0], start(RANK)[0]) for _ in range(PAIRS)]
    ratios = sorted(rank / baseline for baseline, rank in pairs)
    for name, column, code in (("torch and DeepSpeed", 0, BASELINE), ("a rank", 1, RANK)):
        seconds = statistics.median(pair[column] for pair in pairs)
        print(f"{name}: {seconds:.2f} s of processor, {start(code)[1]} modules, files opened: {opened(code) or 'no strace'}")
    print(f"ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} .. {ratios[-1]:.3f}), target 1.25")


if __name__ == "__main__":
    main()
