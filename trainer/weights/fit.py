"""Do these weights fit this run? THE comparison of what is recorded of weights with the run that is to use them.

What belongs to a channel, a target or a lead time is found by its name. What gives weights another meaning though their
shapes agree (heads, the direction of the bias, ...) is refused unless it is accepted by its name. What nobody recorded is said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.variables import MODEL_INPUTS
from trainer.checkpoint.manifest import CheckpointError
from trainer.config import ConfigError, InitFrom, Run
from trainer.config_file import validate
from trainer.model.compat import SETTINGS, translate
from trainer.model.topoflow import START_AT_ZERO, TopoFlow
from trainer.weights.reading import Weights
from trainer.weights.report import ImportReport, match

CHANNELS = "data.inputs"
# name -> the dimension that counts channels; of the head, of its rows as (pixels of a patch, channels)
ALONG = {"var_embed": 1, "token_embeds.proj_weights": 0, "token_embeds.proj_biases": 0, "head.4.weight": 1, "head.4.bias": 1}
OF_A_BIAS = ("model.elevation_bias", "model.bias_floor", "model.elevation_as_given")


def meaning(run: Run) -> dict[str, Any]:
    """What of a run gives its weights their meaning where their shapes do not tell, by key of the configuration."""
    arch = run.architecture()
    settings = {
        CHANNELS: run.data.channels().names,
        "data.targets": run.data.targets,
        "data.lead_hours": run.data.lead_hours,
        "data.transform": dict(run.data.transform),
        "model.grid": list(run.model.grid),
        "model.patch": run.model.patch,
        "model.heads": run.model.heads,
        "model.predict": run.model.predict,
        "wind_scan.mode": run.wind_scan.mode,
    }
    of_a_bias = (arch.elevation_bias, arch.bias_floor, run.elevation_as_given)
    return settings | (dict(zip(OF_A_BIAS, of_a_bias, strict=True)) if arch.elevation_bias != "none" else {})


def network_of(weights: Weights, run: Run, source: InitFrom | None = None) -> tuple[TopoFlow, ImportReport]:
    """The network of a run with weights; those that may be missing are its own random ones.

    Raises:
        CheckpointError: the weights do not load completely, or were made for another run than this.
    """
    torch.manual_seed(run.seed)
    network = TopoFlow(run.architecture())
    tensors, report = fit(weights, network, run, source)
    report.refuse_unless_complete()
    network.load_state_dict({**network.state_dict(), **tensors})
    return network, report


def fit(
    weights: Weights, network: TopoFlow, run: Run, source: InitFrom | None = None
) -> tuple[dict[str, Tensor], ImportReport]:
    """Translate, compare and match weights with the network of a run; nothing is refused yet.

    Args:
        source: what was said of weights that are not the run's own.

    Returns:
        fp32 tensors by our names, and the report.

    Raises:
        CheckpointError: the record of the weights is not that of a run.
    """
    source = source or InitFrom(path=Path(weights.source))
    allow_missing, allow_change = source.allow_missing, source.allow_change
    own = network.state_dict()
    translated = translate(weights.tensors, {name: tensor.shape for name, tensor in own.items()})
    state = translated.state
    scales = [state.pop(name) for name in list(state) if name.split(".")[-1] == "H_scale"]
    now, before = meaning(run), _recorded(weights, state)
    differences: dict[str, str] = {}
    notes: list[str] = []
    fresh: list[str] = []
    left_out: list[str] = []
    channels = _channels(weights, source, _count(state), now[CHANNELS], before, differences)
    if channels is not None and channels != now[CHANNELS]:
        state = _by_channel(state, own, channels, now[CHANNELS])
        fresh, left_out = (sorted(set(a) - set(b)) for a, b in ((now[CHANNELS], channels), (channels, now[CHANNELS])))
    lacking = _place_analysis_weight(state, now, before) if "analysis_weight" in own else ""
    if lacking and "analysis_weight" in allow_missing:
        del state["analysis_weight"]
        lacking = ""
    parameters = {name: tensor.shape for name, tensor in own.items() if name.split(".")[-1] != "H_scale"}
    tensors, report = match(weights.source, state, parameters, list(allow_missing), None if weights.record else START_AT_ZERO)
    if lacking:
        report.unfit["analysis_weight"] = lacking
    for scale in scales:
        if scale.numel() != 1 or float(scale) != 1000.0:
            report.misshapen["H_scale"] = f"{scale.flatten()[:2].tolist()} m in the file, 1000 m here"
    differences |= _differences(now, before, channels)
    report.accepted = [f"{key}: {text}" for key, text in differences.items() if key in allow_change]
    report.changed = {key: text for key, text in differences.items() if key not in allow_change}
    unrecorded = [f"{key} {now[key]}" for key in now if key not in before and key != CHANNELS]
    if unrecorded and weights.record is None:
        notes.append(f"not recorded, taken as configured: {', '.join(unrecorded)}")
    if CHANNELS not in before and channels is not None:
        notes.append(f"the order of channels is not recorded, taken as {source.channels or 'published'}: {', '.join(channels)}")
    report.notes, report.fresh, report.left_out = notes, fresh, left_out
    report.remapped, report.ignored = translated.remapped, translated.ignored
    report.taken, report.also = weights.taken, weights.also
    report.advice = [setting for name, setting in SETTINGS.items() if name in report.unexpected]
    return tensors, report


def _recorded(weights: Weights, state: dict[str, Tensor]) -> dict[str, Any]:
    """What is known of the weights: all of it where they are ours, what a foreign file tells of itself elsewhere."""
    if weights.record is not None:
        try:
            return meaning(validate(dict(weights.record.config), f"the record of {weights.source}"))
        except ConfigError as error:
            raise CheckpointError(f"{weights.source} does not say which network it has: {error}") from error
    told = dict(weights.told)
    count = _count(state)
    lists = [names for names in told.pop(CHANNELS, []) if len(names) == count and len(set(names)) == count]
    return {key: values[0] for key, values in told.items()} | ({CHANNELS: lists[0]} if lists else {})


def _count(state: dict[str, Tensor]) -> int:
    """Channels of the weights; 0 where that is not to be seen."""
    embedded = state.get("var_embed")
    return embedded.shape[1] if embedded is not None and embedded.ndim == 3 else 0


def _channels(
    weights: Weights, source: InitFrom, count: int, wanted: list[str], before: dict[str, Any], differences: dict[str, str]
) -> list[str] | None:
    """Names of the channels of the weights, in their order; None where nobody can say.

    Args:
        count: of the channels of the weights.
        wanted: the channels of the run.
    """
    published = list(MODEL_INPUTS)
    stated = {"published": published, "configured": wanted}.get(str(source.channels), source.channels)
    names = before.get(CHANNELS, stated)
    if names is None and count == len(published) and wanted == published:
        names = published
    if names is None:
        if count in (len(published), len(wanted)):
            differences[CHANNELS] = (
                f"{weights.source} does not say in which order its {count} channels are, and {', '.join(wanted)} is not the "
                "published one: say so with --channels published, --channels configured or a list (init_from.channels)"
            )
        return None
    told = weights.record is None and CHANNELS in before
    if stated is not None and stated != names:
        differences[CHANNELS] = f"{', '.join(names)} recorded, {', '.join(stated)} stated"
    elif len(names) != count or not set(names) & set(wanted):
        differences[CHANNELS] = f"{', '.join(names)} stated of {count} channels, {', '.join(wanted)} here"
    elif told and set(names) - set(wanted) and set(wanted) - set(names) and CHANNELS not in source.allow_change:
        differences[CHANNELS] = f"the file calls its channels {', '.join(names)}, they are {', '.join(wanted)} here"
    else:
        return list(names)
    return None


def _by_channel(state: dict[str, Tensor], own: dict[str, Tensor], before: list[str], now: list[str]) -> dict[str, Tensor]:
    """The weights with the channels `now` instead of `before`; a channel that was not there starts as in `own`."""
    places = [(now.index(name), before.index(name)) for name in now if name in before]
    here, there = (torch.tensor(column, dtype=torch.int64) for column in zip(*places, strict=True))
    moved = dict(state)
    for name, dim in ALONG.items():
        if name not in state or name not in own:
            continue
        old, new = state[name], own[name].detach().clone().to(state[name].dtype).cpu()
        if name.startswith("head"):
            if old.shape[0] % len(before) or old.shape[0] // len(before) != new.shape[0] // len(now):
                continue  # of another patch: a shape that does not match
            old, new = old.unflatten(0, (-1, len(before))), new.unflatten(0, (-1, len(now)))
        if old.shape[dim] != len(before) or old.index_select(dim, there).shape != new.index_select(dim, here).shape:
            continue
        new.index_copy_(dim, here, old.index_select(dim, there))
        moved[name] = new.flatten(0, 1) if name.startswith("head") else new
    return moved


def _place_analysis_weight(state: dict[str, Tensor], now: dict[str, Any], before: dict[str, Any]) -> str:
    """Bring the share of the analysis' anomaly of every target and lead time to its place, by name; why that cannot be."""
    for dim, key in enumerate(("data.targets", "data.lead_hours")):
        if "analysis_weight" not in state or key not in before or before[key] == now[key]:
            continue
        absent = [wanted for wanted in now[key] if wanted not in before[key]]
        if absent:
            return (
                f"was learned for {key} {before[key]}, not for {absent}: where it may be missing, it is fitted to the data "
                "when the run begins"
            )
        places = torch.tensor([before[key].index(wanted) for wanted in now[key]])
        state["analysis_weight"] = state["analysis_weight"].index_select(dim, places)
    return ""


def _differences(now: dict[str, Any], before: dict[str, Any], channels: list[str] | None) -> dict[str, str]:
    found = {}
    for key, wanted in now.items():
        if key in (CHANNELS, "data.targets", "data.lead_hours") or key not in before:
            continue  # found by name
        learned = before[key]
        if key == "data.transform":
            shared = set(now[CHANNELS]) & set(channels or ())
            learned, wanted = ({name: kind for name, kind in each.items() if name in shared} for each in (learned, wanted))
        if learned != wanted:
            found[key] = f"{learned} recorded, {wanted} here"
    return found
