"""When the learned strength of the elevation bias is worth a warning."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trainer.scores.strength import ENOUGH_STEPS, judged, judged_in


def path(end: float, noise: float, steps: int) -> list[dict]:
    """An alpha that goes to its end over the first quarter, and fluctuates."""
    rng, every = np.random.default_rng(0), np.arange(20, steps + 1, 20)
    alpha = end * np.minimum(every / steps * 4, 1) + noise * rng.standard_normal(len(every))
    return [{"step": int(s), "elevation_alpha": float(a)} for s, a in zip(every, alpha, strict=True)]


@pytest.mark.parametrize(
    ("end", "noise", "steps", "warning"),
    [
        (1.2, 0.05, 600, ""),
        (-1.2, 0.05, 600, "below 0"),
        (0.1, 0.05, 600, "does little"),
        (-0.5, 0.05, 3000, "does little"),
        (-1.2, 0.05, ENOUGH_STEPS - 20, ""),
    ],
)
def test_a_bias_of_the_wrong_sign_or_none_is_said(end: float, noise: float, steps: int, warning: str) -> None:
    said = judged(path(end, noise, steps))
    assert warning in said
    assert bool(said) == bool(warning)


def test_a_run_is_judged_by_its_log(tmp_path: Path) -> None:
    rows = [json.dumps(row | {"kind": "train"}) for row in path(-1.2, 0.05, 600)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*rows, '{"kind": "validation", "step": 600}', '{"kind": "tra']))
    assert "below 0" in judged_in(tmp_path)
    assert judged_in(tmp_path / "elsewhere") == ""


def test_a_network_without_the_bias_is_not_judged() -> None:
    assert judged([{"step": 1000, "loss": 0.1}]) == ""
    assert judged([]) == ""
