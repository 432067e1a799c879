"""What cannot be measured here must at least run: the benchmark that waits for a GPU."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.gpu_step import FlexAttention
from tests.launching import run
from trainer.model.architecture import Architecture
from trainer.model.attention import Attention


def test_the_gpu_benchmark_runs_on_a_small_network() -> None:
    done = run([sys.executable, "-m", "benchmarks.gpu_step", "--tiny", "--micro", "1", "2"])
    assert done.returncode == 0, done.stderr
    for line in ("Obvious", "elevation bias by", "host waits inside forward and backward"):
        assert line in done.stdout


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_rival_attention_computes_the_same() -> None:
    torch.manual_seed(0)
    arch = Architecture((20, 8), 1, (0,), width=32, heads=2, alpha_init=2.0)
    ours, rival = (kind(arch, first=True).double() for kind in (Attention, FlexAttention))
    rival.load_state_dict(ours.state_dict())
    x, z = torch.randn(2, 40, 32, dtype=torch.float64), torch.rand(2, 40, dtype=torch.float64).mul(4000)
    with torch.no_grad():
        torch.testing.assert_close(rival(x, z), ours(x, z), rtol=1e-6, atol=1e-7)  # its slope is fp32
