"""What scoring costs: an evaluation of a run's test split against the forward passes alone, in samples/s.

python -m benchmarks.evaluation runs/demo [SAMPLES]
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.measuring import interleaved, ratio
from trainer.forecaster import load_forecaster
from trainer.verification.evaluation import Options, setting_of
from trainer.verification.tally import tally


def main() -> None:
    run, wanted = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2000
    forecaster = load_forecaster(run)
    dataset, micro = forecaster.dataset, forecaster.run.batch.micro
    index = dataset.index("test")
    setting, numbers, _ = setting_of(forecaster, index, Options())
    numbers = np.resize(numbers, wanted)
    setting.samples = wanted
    raw = next(dataset.stream(index).listed(numbers[:micro], micro))
    _, _, arguments = dataset.prepare(raw)

    @torch.no_grad()
    def forward() -> None:
        for _ in range(-(-wanted // micro)):
            forecaster.model(*arguments)

    def whole() -> None:
        tally(forecaster.model, dataset.stream(index).listed(numbers, micro), np.arange(wanted), setting)

    seconds = interleaved({"forward": forward, "evaluation": whole}, rounds=3)
    forward_s, whole_s = (statistics.median(seconds[name]) for name in ("forward", "evaluation"))
    print(f"{wanted} samples, {torch.get_num_threads()} threads: forward passes {forward_s:.1f} s, evaluation {whole_s:.1f} s")
    print(f"evaluation / forward passes: {ratio(seconds, 'evaluation', 'forward'):.3f} (limit 1.3)")


if __name__ == "__main__":
    main()
