"""Weights and optimizer state by parameter name, out of an engine and back, whatever its ZeRO stage and number of ranks.

DeepSpeed keeps AdamW's moments flat, cut and in an order that depends on stage, ranks and settings. What is saved here is
what a parameter has: its fp32 value, `exp_avg`, `exp_avg_sq` and `step`. So any number of ranks, any stage and any layout
loads any checkpoint, and state can only land where its name is.

Loading after `deepspeed.initialize` is done in both places that matter: in the fp32 masters, which the next step starts
from, and in the weights of the forward pass. `prove` then compares both, and the moments, with what was loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.checkpoint import consistency
from trainer.checkpoint.manifest import CheckpointError
from trainer.checkpoint.zero import (
    EMA,
    MOMENTS,
    create_states,
    kinds_of,
    misplaced_masters,
    read_parameter,
    shape_of,
    states_of,
    step_of_adam,
    write_forward,
    write_parameter,
)

WEIGHTS_FILE = Path("weights.safetensors")
SHARE_BYTES = 1 << 30  # of optimizer state; more is gathered on, and written by, several ranks


@dataclass
class Named:
    """fp32 tensors on the CPU; on rank 0, where something was read, and empty on all other ranks."""

    weights: dict[str, Tensor] = field(default_factory=dict)  # parameters and persistent buffers
    moments: dict[str, Tensor] = field(default_factory=dict)  # "NAME.exp_avg", "NAME.exp_avg_sq", "NAME.step"; none: zeros


def capture(engine: Any) -> dict[Path, dict[str, Tensor]]:
    """Copies of what this rank has to write, by file; collective.

    Rank 0 writes the weights. The optimizer's state goes to one file, or to as many as it fills with SHARE_BYTES, each
    gathered on a rank of its own.
    """
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    files: dict[Path, dict[str, Tensor]] = {}
    weights = _full_weights(engine)
    if weights:
        files[WEIGHTS_FILE] = weights
    for file, writer, names in shares({name: shape_of(p).numel() for name, p in trained.items()}, dist.get_world_size()):
        for name in names:
            values = {f"{name}.{kind}": read_parameter(engine, trained[name], kind) for kind in kinds_of(engine)}
            values[f"{name}.step"] = step_of_adam(engine)
            if dist.get_rank() == writer:
                files.setdefault(file, {}).update({key: _published(value) for key, value in values.items()})
    return files


def shares(sizes: dict[str, int], ranks: int, share_bytes: int | None = None) -> list[tuple[Path, int, list[str]]]:
    """[(file, rank that writes it, names)]: parameters in order, cut where a file would be over `share_bytes`."""
    limit = share_bytes or SHARE_BYTES
    cuts: list[list[str]] = [[]]
    filled = 0
    for name, numel in sizes.items():
        size = 4 * len(MOMENTS) * numel
        if cuts[-1] and filled + size > limit:
            cuts.append([])
            filled = 0
        cuts[-1].append(name)
        filled += size
    count = len(cuts)
    names = (
        ["optimizer.safetensors"] if count == 1 else [f"optimizer-{i + 1:03d}-of-{count:03d}.safetensors" for i in range(count)]
    )
    return [(Path(name), i * ranks // count, cut) for i, (name, cut) in enumerate(zip(names, cuts, strict=True))]


@torch.no_grad()
def restore(engine: Any, named: Named) -> list[dict[str, Any]]:
    """Put rank 0's `named` into every rank's masters, forward weights and optimizer; collective.

    State of parameters that had none starts at zero, a running mean at the weights; both are filled
    into `named`. State that nobody has a use for is left out.

    Returns:
        Such differences where there was state before, [{"name", "before", "after"}].

    Raises:
        CheckpointError: on every rank, if a name or shape is not the engine's; nothing was changed then.
    """
    parameters = dict(engine.module.named_parameters())
    changes = consistency.on_main(lambda: _complete(engine, named))
    create_states(engine)
    for buffer_name, buffer in _persistent_buffers(engine):
        buffer.copy_(_from_main(named.weights.get(buffer_name), buffer.shape, engine.device).to(buffer.dtype))
    for name, parameter in parameters.items():
        value = _from_main(named.weights.get(name), shape_of(parameter), engine.device)
        write_parameter(engine, parameter, None, value)
        write_forward(parameter, value)
        for kind in kinds_of(engine) if parameter.requires_grad else ():
            moment = named.moments.get(f"{name}.{kind}")
            value = _from_main(moment, shape_of(parameter), engine.device)
            write_parameter(engine, parameter, kind, value)
    steps = [tensor for key, tensor in named.moments.items() if key.endswith(".step")]
    step = _from_main(steps[0] if steps else torch.zeros(()), torch.Size(()), engine.device)
    for state in states_of(engine):
        state["step"].fill_(step.item())
    return changes


@contextmanager
def averaged(engine: Any) -> Iterator[None]:
    """With the running mean of the weights in the forward pass, where one is kept; collective."""
    if engine.ema_decay is None:
        yield
        return
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    held = [getattr(p, "ds_tensor", p).data.clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            write_forward(parameter, read_parameter(engine, parameter, EMA))
        try:
            yield
        finally:
            for parameter, values in zip(parameters, held, strict=True):
                getattr(parameter, "ds_tensor", parameter).data.copy_(values)


def prove(engine: Any, recorded: dict[str, str]) -> None:
    """Compare what every rank's next forward pass uses, what its optimizer will update, and its moments; collective.

    Args:
        recorded: hashes of what was loaded, on rank 0.

    Raises:
        CheckpointError: on every rank, naming the first differing tensor and the ranks.
    """
    held = [(name, p) for name, p in engine.module.named_parameters() if not hasattr(p, "ds_id")]
    consistency.require_equal(
        consistency.hash_tensors([*held, *engine.module.named_buffers()]), {}, "weights before the next step"
    )
    consistency.require_equal(
        consistency.hash_tensors(_everything(engine)), recorded, "optimizer's weights and moments before the next step"
    )
    misplaced = misplaced_masters(engine)
    everywhere = torch.tensor(float(misplaced), device=engine.device)
    dist.all_reduce(everywhere)
    if everywhere:
        raise CheckpointError(
            "under these settings DeepSpeed keeps the optimizer's state of a parameter elsewhere than it "
            "says: nothing was trained. Compare its configuration with ds_configs/."
        )


def hashes_of(named: Named, engine: Any) -> dict[str, str]:
    """What `prove` has to find after `restore(engine, named)`; of rank 0's tensors, empty elsewhere."""
    if dist.get_rank() != 0:
        return {}
    own = dict(engine.module.named_parameters())
    weights = {name: tensor for name, tensor in named.weights.items() if name in own}
    for name, parameter in own.items():
        if not parameter.requires_grad:  # it has no fp32 master, and is kept as the forward pass uses it
            weights[name] = weights[name].to(parameter.dtype).float()
    return consistency.hash_tensors((weights | named.moments).items())


def _everything(engine: Any) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in engine.module.named_parameters():
        yield name, read_parameter(engine, parameter, None)
        for kind in kinds_of(engine) if parameter.requires_grad else ():
            yield f"{name}.{kind}", read_parameter(engine, parameter, kind)
        if parameter.requires_grad:
            yield f"{name}.step", step_of_adam(engine)


def _full_weights(engine: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers in fp32 on the CPU of rank 0 (empty elsewhere); collective."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        value = read_parameter(engine, parameter, None)
        if dist.get_rank() == 0:
            weights[name] = _published(value)
    if dist.get_rank() == 0:
        weights |= {name: buffer.detach().to("cpu", torch.float32, copy=True) for name, buffer in _persistent_buffers(engine)}
    return weights


def _published(value: Tensor) -> Tensor:
    """A copy as it is written: fp32, on the CPU; a scalar has the shape (), also where the module holds it as (1,)."""
    value = value.reshape(()) if value.numel() == 1 else value
    return value.detach().to("cpu", torch.float32, copy=True).contiguous()


def _persistent_buffers(engine: Any) -> list[tuple[str, Tensor]]:
    kept = engine.module.state_dict().keys()
    return [(name, buffer) for name, buffer in engine.module.named_buffers() if name in kept]


def _complete(engine: Any, named: Named) -> list[dict[str, Any]]:
    """Make the state in `named` that of the engine; refuses weights and shapes of another one."""
    parameters = dict(engine.module.named_parameters())
    shapes = {name: shape_of(p) for name, p in parameters.items()}
    shapes |= {name: buffer.shape for name, buffer in _persistent_buffers(engine)}
    trained = {name: shape_of(p) for name, p in parameters.items() if p.requires_grad}
    wanted = {f"{name}.step": torch.Size(()) for name in trained}
    for kind in kinds_of(engine):
        wanted |= {f"{name}.{kind}": shape for name, shape in trained.items()}
    wrong = _unfit("weight", named.weights, shapes)
    new, unused = wanted.keys() - named.moments.keys(), named.moments.keys() - wanted.keys()
    had = bool(named.moments)
    steps = {float(tensor) for key, tensor in named.moments.items() if key.endswith(".step")}
    if len(steps) > 1:
        wrong.append(f"parameters have been updated {sorted(steps)} times, not equally often")
    for key in unused:
        del named.moments[key]
    kept = {key: wanted[key] for key in wanted.keys() - new}
    wrong += _unfit("optimizer state", named.moments, kept)
    if wrong:
        listed = "; ".join(sorted(wrong)[:6])
        raise CheckpointError(f"what was read does not fit the network: {listed}. Nothing was loaded.")
    for key in new:
        name, _, kind = key.rpartition(".")
        if kind == EMA:
            named.moments[key] = named.weights[name].reshape(wanted[key]).float().clone()
        else:
            value = max(steps, default=0.0) if kind == "step" else 0.0
            named.moments[key] = torch.full(wanted[key], value)
    pairs = [(f"none of {_listed(new)}", "zero; a running mean: the weights")] if new else []
    pairs += [(_listed(unused), "left out")] if unused else []
    changes = [{"name": "optimizer state", "before": a, "after": b} for a, b in pairs]
    return changes if had else []


def _listed(keys: Collection[str]) -> str:
    return ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _unfit(what: str, given: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> list[str]:
    """How names or shapes differ; a scalar may be () here and (1,) there."""
    wrong = [f"{what} '{name}' is missing" for name in wanted.keys() - given.keys()]
    wrong += [f"{what} '{name}' is unknown here" for name in given.keys() - wanted.keys()]
    for name, shape in wanted.items():
        found = given[name].shape if name in given else shape
        if found != shape and not found.numel() == shape.numel() == 1:
            wrong.append(f"{what} '{name}' has shape {tuple(found)}, not {tuple(shape)}")
    return wrong


def _from_main(value: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor:
    """Rank 0's tensor on every rank, fp32; collective."""
    if dist.get_rank() == 0:
        assert value is not None
        sent = value.detach().to(device, torch.float32).reshape(shape).contiguous()
        sent = sent.clone() if sent.data_ptr() == value.data_ptr() else sent
    else:
        sent = torch.empty(shape, dtype=torch.float32, device=device)
    dist.broadcast(sent, src=0)
    return sent
