"""`trainer/train.py` whose rank 1 freezes when it enters a phase: frozen.py PHASE ARGUMENTS..."""

import os
import signal
import sys

from trainer.process.options import parse
from trainer.process.rank import run_rank
from trainer.process.watchdog import Watchdog
from trainer.train import train

phase, arguments = sys.argv[1], sys.argv[2:]
enter = Watchdog.enter


def freeze_there(self: Watchdog, entered: str) -> None:
    enter(self, entered)
    if entered == phase and self.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


Watchdog.enter = freeze_there  # type: ignore[method-assign]
sys.exit(run_rank(parse(arguments), train))
