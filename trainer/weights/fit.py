"""Do these weights fit this run? THE comparison of what is recorded of weights with the run.

What belongs to a channel, a target or a lead time is found by its name. What gives weights another
meaning though their shapes agree (heads, the direction of the bias, ...) is refused unless it is
accepted by its name. What nobody recorded is said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.variables import MODEL_INPUTS
from trainer.checkpoint.manifest import CheckpointError
from trainer.config import InitFrom, Run
from trainer.config_file import validate
from trainer.model.compat import SETTINGS, translate
from trainer.model.topoflow import START_AT_ZERO, TopoFlow
from trainer.weights.reading import Weights
from trainer.weights.report import ImportReport, match

CHANNELS, TARGETS, LEADS, FACTORS = "data.inputs", "data.targets", "data.lead_hours", "model.sources"
# Parameters whose rows, and columns, stand for names of these lists.
PLACED = {"analysis_weight": (TARGETS, LEADS), "sources.source_maps": (TARGETS, FACTORS), "sources.log_lifetime": (TARGETS,)}
# name -> the dimension that counts channels; rows of the head are (pixels of a patch, channels)
ALONG = {"var_embed": 1, "token_embeds.proj_weights": 0, "token_embeds.proj_biases": 0}
ALONG |= {"head.4.weight": 1, "head.4.bias": 1}
Meaning = dict[str, Any]  # key of a configuration -> its value


def meaning(run: Run) -> Meaning:
    """What of a run gives its weights their meaning where their shapes do not tell."""
    settings: Meaning = {
        CHANNELS: run.data.channels().names,
        TARGETS: run.data.targets,
        LEADS: run.data.lead_hours,
        "data.transform": dict(run.data.transform),
        "model.grid": list(run.model.grid),
        "model.patch": run.model.patch,
        "model.heads": run.model.heads,
        "model.predict": run.model.predict,
        "wind_scan.mode": run.wind_scan.mode,
        FACTORS: list(run.model.sources),
    }
    if run.wind_scan.positions != "replace":
        settings["wind_scan.positions"] = run.wind_scan.positions
    if run.model.elevation_bias != "none":
        settings["model.elevation_bias"] = run.model.elevation_bias
        settings["model.bias_floor"] = run.architecture().bias_floor
        settings["model.elevation_as_given"] = run.elevation_as_given
    return settings


def network_of(weights: Weights, run: Run, source: InitFrom | None = None) -> tuple[TopoFlow, ImportReport]:
    """The network of a run with weights; those that may be missing are its own random ones.

    Raises:
        CheckpointError: the weights do not load completely, or were made for something else.
    """
    torch.manual_seed(run.seed)
    network = TopoFlow(run.architecture())
    tensors, report = fit(weights, network, run, source)
    report.refuse_unless_complete()
    if source is None:
        _require_trained_for(weights, run, report)
    network.load_state_dict({**network.state_dict(), **tensors})
    return network, report


def _require_trained_for(weights: Weights, run: Run, report: ImportReport) -> None:
    """A run's own weights are asked for what they were trained for, and nothing starts fresh.

    Raises:
        CheckpointError: channels, targets or lead times are others.
    """
    now, before = meaning(run), _recorded(weights, 0)
    untrained = []
    for key in (TARGETS, LEADS):
        known = before.get(key) or now[key]
        untrained += [f"{key} {name}" for name in now[key] if name not in known]
    wrong = [*untrained, *(f"channel {name}" for name in [*report.fresh, *report.left_out])]
    if wrong:
        raise CheckpointError(
            f"{weights.source} was not trained with {', '.join(wrong[:6])}: leave the override "
            "out, or train a run that starts from it (init_from)."
        )


def fit(
    weights: Weights, network: TopoFlow, run: Run, source: InitFrom | None = None
) -> tuple[dict[str, Tensor], ImportReport]:
    """Translate, compare and match weights with the network of a run; nothing is refused yet.

    Args:
        source: what was said of weights that are not the run's own.

    Returns:
        fp32 tensors by our names, and the report.

    Raises:
        ConfigError: the record of the weights is not that of a run.
    """
    source = source or InitFrom(path=Path(weights.source))
    own = network.state_dict()
    translated = translate(weights.tensors, {name: tensor.shape for name, tensor in own.items()})
    state = translated.state
    scales = [state.pop(name) for name in list(state) if name.split(".")[-1] == "H_scale"]
    embedded = state.get("var_embed")
    count = embedded.shape[1] if embedded is not None and embedded.ndim == 3 else 0
    now, before = meaning(run), _recorded(weights, count)
    channels, unclear = _channels(weights, source, count, now[CHANNELS], before.get(CHANNELS))
    if channels is not None and channels != now[CHANNELS]:
        state = _by_channel(state, own, channels, now[CHANNELS])
    lacking = {name: why for name in PLACED if (why := _place(state, name, now, before))}
    for name in [name for name in lacking if name.split(".")[-1] in source.allow_missing]:
        del state[name], lacking[name]
    parameters = {name: t.shape for name, t in own.items() if name.split(".")[-1] != "H_scale"}
    constant = None if weights.record else START_AT_ZERO
    tensors, report = match(weights.source, state, parameters, source.allow_missing, constant)
    report.unfit |= {name: why for name, why in lacking.items() if name in own}
    for scale in scales:
        if scale.numel() != 1 or float(scale) != 1000.0:
            report.misshapen["H_scale"] = f"{scale.flatten()[:2].tolist()} m there, 1000 m here"
    found = _differences(now, before, channels) | ({CHANNELS: unclear} if unclear else {})
    report.changed = {key: how for key, how in found.items() if key not in source.allow_change}
    report.accepted = [f"{key}: {found[key]}" for key in found if key in source.allow_change]
    report.notes = _unrecorded(weights, now, before, channels)
    report.fresh = sorted(set(now[CHANNELS]) - set(channels or now[CHANNELS]))
    report.left_out = sorted(set(channels or ()) - set(now[CHANNELS]))
    report.remapped, report.ignored = translated.remapped, translated.ignored
    report.taken, report.also = weights.taken, weights.also
    report.advice = [key for name, key in SETTINGS.items() if name in report.unexpected]
    return tensors, report


def _recorded(weights: Weights, count: int) -> Meaning:
    """What is known of the weights: all of ours, what a foreign file tells of itself elsewhere."""
    if weights.record is not None:
        return meaning(validate(weights.record.config, f"the record of {weights.source}"))
    told = {key: values[0] for key, values in weights.told.items() if key != CHANNELS}
    for names in weights.told.get(CHANNELS, []):
        if len(set(names)) == len(names) == count:
            return told | {CHANNELS: names}
    return told


def _channels(
    weights: Weights, source: InitFrom, count: int, wanted: list[str], known: list[str] | None
) -> tuple[list[str] | None, str]:
    """Names of the channels of the weights, in their order; or None, and what is unclear."""
    published = list(MODEL_INPUTS)
    named = {"published": published, "configured": wanted, "None": None}
    stated = named.get(str(source.channels), source.channels)
    names = known or stated
    if names is None and count == len(wanted) and wanted == published:
        names = published
    here = f"{', '.join(wanted)} here"
    if names is None:
        why = (
            f"{weights.source} does not say in which order its {count} channels are, and {here} is "
            "not the published one: say so with --channels published, --channels configured or a "
            "list (init_from.channels)"
        )
        return None, why if count in (len(published), len(wanted)) else ""
    spelt = set(names) - set(wanted) and set(wanted) - set(names)
    if stated not in (None, names):
        return None, f"{', '.join(names)} recorded, {', '.join(stated or ())} stated"
    if len(names) != count or not set(names) & set(wanted):
        return None, f"{', '.join(names)} named of {count} channels, {here}"
    if spelt and known and weights.record is None and CHANNELS not in source.allow_change:
        return None, f"the file calls its channels {', '.join(names)}, {here}"
    return list(names), ""


def _by_channel(state: dict[str, Tensor], own: dict[str, Tensor], before: list[str], now: list[str]) -> dict[str, Tensor]:
    """The weights with the channels `now`; one that was not there starts as in `own`."""
    shared = [name for name in now if name in before]
    here = torch.tensor([now.index(name) for name in shared])
    there = torch.tensor([before.index(name) for name in shared])
    moved = dict(state)
    for name in ALONG.keys() & state.keys() & own.keys():
        dim, old, new = ALONG[name], state[name], own[name].detach().clone().cpu()
        if name.startswith("head"):
            if old.shape[0] * len(now) != new.shape[0] * len(before):
                continue  # of another patch: a shape that does not match
            old, new = old.unflatten(0, (-1, len(before))), new.unflatten(0, (-1, len(now)))
        chosen = old.index_select(dim, there).to(new.dtype)
        if chosen.shape == new.index_select(dim, here).shape:
            new.index_copy_(dim, here, chosen)
            moved[name] = new.flatten(0, 1) if name.startswith("head") else new
    return moved


def _place(state: dict[str, Tensor], name: str, now: Meaning, before: Meaning) -> str:
    """Bring rows and columns of a parameter to their places, by what they stand for; or say why that fails."""
    for dim, key in enumerate(PLACED[name]):
        known = list(before.get(key) or now[key])
        if name not in state or known == now[key]:
            continue
        absent = [wanted for wanted in now[key] if wanted not in known]
        if absent:
            return (
                f"was learned for {key} {known}, not for {absent}: where it may be missing (init_from.allow_missing), it "
                "is fitted or learned anew"
            )
        places = torch.tensor([known.index(wanted) for wanted in now[key]])
        state[name] = state[name].index_select(dim, places)
    return ""


def _differences(now: Meaning, before: Meaning, channels: list[str] | None) -> dict[str, str]:
    """In what the weights were made otherwise, of what is not found by its name."""
    shared, found = set(now[CHANNELS]) & set(channels or ()), {}
    for key in now.keys() & before.keys() - {CHANNELS, TARGETS, LEADS, FACTORS}:
        then, today = before[key], now[key]
        if key == "data.transform":
            then, today = ({k: x for k, x in each.items() if k in shared} for each in (then, today))
        if then != today:
            found[key] = f"{then} recorded, {today} here"
    return found


def _unrecorded(weights: Weights, now: Meaning, before: Meaning, channels: list[str] | None) -> list[str]:
    """What is taken as configured, since nobody has recorded it."""
    if weights.record is not None:
        return []
    taken = [f"{key} {now[key]}" for key in now if key not in before and key != CHANNELS]
    if CHANNELS not in before:
        taken.insert(0, f"the order of channels, {', '.join(channels or ())}")
    return [f"not recorded, taken as configured: {', '.join(taken)}"] if taken else []
