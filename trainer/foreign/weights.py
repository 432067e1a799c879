"""Foreign weights for our network: read, translated and matched."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trainer.config import Run
from trainer.foreign.channels import by_name, channels_of
from trainer.foreign.directories import read_tensors
from trainer.foreign.records import direction_of
from trainer.foreign.report import ImportReport, match
from trainer.model.compat import SETTINGS, translate
from trainer.model.topoflow import START_AT_ZERO, TopoFlow

FIRST = "blocks.0.attn"


def import_weights(
    model: TopoFlow, path: Path, allow_missing: list[str], channels: list[str] | None = None
) -> tuple[dict[str, Tensor], ImportReport]:
    """Read, translate and match foreign weights; nothing is changed in `model`, nothing is refused yet.

    Args:
        channels: names of the model's, where what belongs to one of another network's is to be found by its name.

    Returns:
        fp32 tensors by our names, and the report.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    foreign = read_tensors(path)
    translated = translate(foreign.tensors, expected)
    parameters = {name: shape for name, shape in expected.items() if name != f"{FIRST}.H_scale"}
    scale = translated.state.pop(f"{FIRST}.H_scale", None)
    embedded = translated.state.get("var_embed")
    before = None
    if channels is not None and embedded is not None and embedded.ndim == 3:
        before = channels_of(path, embedded.shape[1])
    fresh: list[str] = []
    left_out: list[str] = []
    if channels is not None and before is not None and before != channels and set(before) & set(channels):
        translated.state = by_name(translated.state, model.state_dict(), before, channels)
        fresh, left_out = (sorted(set(a) - set(b)) for a, b in ((channels, before), (before, channels)))
    tensors, report = match(str(path), translated.state, parameters, allow_missing, START_AT_ZERO)
    if scale is not None and float(scale) != 1000.0:
        report.misshapen[f"{FIRST}.H_scale"] = f"{float(scale)} m in the file, 1000 m here"
    learned, wanted = direction_of(path), model.arch.elevation_bias
    if {learned, wanted} == {"descent", "climb"}:  # one name for both, since the published one is in files
        report.unfit[f"{FIRST}.elevation_alpha"] = f"was learned with model.elevation_bias={learned}, here it is {wanted}"
    report.fresh, report.left_out = fresh, left_out
    report.remapped, report.ignored = translated.remapped, translated.ignored
    report.taken, report.also = foreign.taken, foreign.also
    report.advice = [setting for name, setting in SETTINGS.items() if name in report.unexpected]
    return tensors, report


def network_with(run: Run, path: Path, allow_missing: list[str]) -> tuple[TopoFlow, ImportReport]:
    """The network of a configuration with the weights of a file; those that may be missing are its own random ones.

    Raises:
        CheckpointError: the file does not load completely.
    """
    torch.manual_seed(run.seed)
    network = TopoFlow(run.architecture())
    tensors, report = import_weights(network, path, allow_missing, run.data.channels().names)
    report.refuse_unless_complete()
    network.load_state_dict({**network.state_dict(), **tensors})
    return network, report
