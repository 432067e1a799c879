"""The plan's numbers against hand computation and against what a training really writes."""

from __future__ import annotations

import pytest

from tests.launching import ROOT
from trainer.config import ConfigError
from trainer.config_file import load
from trainer.preflight import plan

CHINA = ROOT / "launch/configs/china_128x256.yaml"
PARAMETERS = 52_481_341


def test_parameters_are_those_of_the_published_network() -> None:
    assert plan.parameters_of(load(CHINA)) == PARAMETERS


@pytest.mark.parametrize(("stage", "bytes_a_parameter"), [(0, 16), (1, 4 + 12 / 8), (2, 2 + (2 + 12) / 8), (3, 16 / 8)])
def test_zero_shares_what_its_stage_shares(stage: int, bytes_a_parameter: float) -> None:
    """Rajbhandari et al. (2020), figure 1, K = 12."""
    assert plan.state_bytes(1000, "bf16", stage, 8) == pytest.approx(1000 * bytes_a_parameter)


def test_communication_is_two_passes_over_the_parameters_and_three_at_stage_3() -> None:
    assert plan.communication_bytes(1000, "fp32", 1, 4) == 2 * 4000 * 3 / 4
    assert plan.communication_bytes(1000, "bf16", 3, 4) == 3 * 2000 * 3 / 4
    assert plan.communication_bytes(1000, "fp32", 2, 1) == 0.0


def test_a_sample_is_seventeen_fields() -> None:
    assert plan.sample_bytes(load(CHINA)) == 17 * 128 * 256 * 4


def test_a_batch_that_400_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Nearest possible: batch\.total=800"):
        plan.tables(load(CHINA, ["batch.total=900"]), 400, plan.GPUS["h200"], 0.35, 1, None)


def test_the_plan_states_days_memory_and_storage() -> None:
    quantities, memory = plan.tables(load(CHINA), 400, plan.GPUS["h200"], 0.35, 1, None)
    names = list(quantities.columns[0].cells)
    values = dict(zip(names, quantities.columns[1].cells, strict=True))
    assert values["parameters"] == f"{PARAMETERS:,}"
    assert values["batch"] == "800 = 2 micro x 1 accumulated x 400 ranks"
    assert "GPU-hours" in values["the run"]
    assert "samples/s" in values["needed from storage"]
    assert list(memory.columns[0].cells) == ["0", "1", "2", "3"]
