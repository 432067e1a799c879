"""Parameters and moments inside a DeepSpeed engine, whatever its ZeRO stage: the one file that knows its flat tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.checkpoint.manifest import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"  # running mean of the masters, kept where moments are: so it is cut, saved and restored like them


def shape_of(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter, also where ZeRO 3 has partitioned it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def misplaced_masters(engine: Any) -> bool:
    """Whether masters lie elsewhere than the weights that the next step copies them to.

    Names are found by DeepSpeed's own map of its flat masters; this looks at the flat tensors themselves, which a step
    copies whole, and so does not believe that map. Moments lie where masters do.
    """
    optimizer, rank, padding = engine.optimizer, dist.get_rank(), 0
    pairs: Iterable[tuple[Tensor, Tensor]]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3
        pairs = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True)
        for parameter in engine.module.parameters():  # what fills a short share up is never looked at
            length = parameter.ds_tensor.numel()
            padding += length - min(length, max(0, parameter.ds_numel - rank * length))
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO 1 and 2
        mine = [partitions[rank] for partitions in optimizer.parallel_partitioned_bit16_groups]
        pairs = zip(optimizer.single_partition_of_fp32_groups, mine, strict=True)
    elif hasattr(optimizer, "bf16_partitioned_groups"):  # ZeRO 1 under bf16
        mine = [partitions[rank] for partitions in optimizer.bf16_partitioned_groups]
        pairs = zip(optimizer.fp32_groups_flat_partition, mine, strict=True)
    else:  # whole: an fp32 copy of each weight, or the weight itself
        masters = plain_masters(engine)
        pairs = [(masters.get(id(p), p), p) for p in engine.module.parameters()]
    differing = [master.to(weight.device, weight.dtype) != weight for master, weight in pairs if weight is not None]
    return sum(int(elements.sum()) for elements in differing) > padding


def inner_of(engine: Any) -> Any:
    """torch's AdamW, inside whatever DeepSpeed wraps around it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _updated(engine: Any) -> list[Tensor]:
    """The tensors that AdamW updates on this rank; ZeRO 3 shows them to it one at a time."""
    partitions = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    return partitions or [tensor for group in inner_of(engine).param_groups for tensor in group["params"]]


def kinds_of(engine: Any) -> tuple[str, ...]:
    """What is kept of every trained parameter beside its value."""
    return MOMENTS if engine.ema_decay is None else (*MOMENTS, EMA)


def follow(engine: Any) -> None:
    """Move the running mean of the weights towards what the last step made of them."""
    if engine.ema_decay is not None:
        for tensor in _updated(engine):
            inner_of(engine).state[tensor][EMA].lerp_(tensor.detach(), 1.0 - engine.ema_decay)


def states_of(engine: Any) -> list[dict[str, Tensor]]:
    state = inner_of(engine).state
    return [state[tensor] for tensor in _updated(engine) if tensor in state]


def step_of_adam(engine: Any) -> Tensor:
    """How often AdamW has updated; alike for all parameters, since all ranks skip the same steps."""
    states = states_of(engine)
    if not states:
        return torch.zeros(())
    found = {float(state["step"]) for state in states}
    if len(found) != 1:
        raise CheckpointError(f"parameters have been updated {sorted(found)} times, not equally often: nothing was saved.")
    return torch.tensor(found.pop())


def create_states(engine: Any) -> None:
    """AdamW and DeepSpeed make and link the moments in the first step only; a load needs them before."""
    inner = inner_of(engine)
    for tensor in _updated(engine):
        state = inner.state[tensor]
        if "step" not in state:
            place = tensor.device if inner.defaults["fused"] else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=place)
        for kind in kinds_of(engine):
            if kind not in state:
                state[kind] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()


def plain_masters(engine: Any) -> dict[int, Tensor]:
    """Without ZeRO under bf16, DeepSpeed keeps a list of fp32 copies in the order of its list of weights."""
    weights, masters = (getattr(engine.optimizer, name, []) for name in ("fp16_groups", "fp32_groups"))
    return {id(p): m for ps, ms in zip(weights, masters, strict=False) for p, m in zip(ps, ms, strict=True)}


def read_parameter(engine: Any, parameter: Tensor, kind: str | None) -> Tensor:
    """The whole fp32 value of a parameter, or of one of its moments; collective under ZeRO."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not parameter.requires_grad:
        return _frozen(parameter)
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        if kind is None:
            return safe_get_full_fp32_param(parameter)
        if not states_of(engine):
            return torch.zeros(shape_of(parameter), device=engine.device)
        return safe_get_full_optimizer_state(parameter, kind)
    master = plain_masters(engine).get(id(parameter), parameter)
    if kind is None:
        return master.detach()
    state = inner_of(engine).state.get(master)
    return state[kind] if state else torch.zeros_like(master)


def _frozen(parameter: Tensor) -> Tensor:
    """The whole value of a parameter that is not trained, which is its forward weight."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def write_parameter(engine: Any, parameter: Tensor, kind: str | None, value: Tensor) -> None:
    """Keep this rank's share of a whole value; a frozen parameter has no master, and `write_forward` is all it needs."""
    if not parameter.requires_grad:
        return
    if hasattr(parameter, "ds_id"):
        _write_partition(parameter, kind, value)
    elif hasattr(parameter, "_hp_mapping"):
        parameter.set_full_hp_param(value, kind)  # type: ignore[attr-defined]
    else:
        master = plain_masters(engine).get(id(parameter), parameter)
        target = master if kind is None else inner_of(engine).state[master][kind]
        target.detach().copy_(value)


def _write_partition(parameter: Any, kind: str | None, value: Tensor) -> None:
    """ZeRO 3's share of this rank, padded where the last one is short (DeepSpeed's own full setter reads past the end)."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    length = parameter.ds_tensor.numel()
    mine = value.flatten()[dist.get_rank() * length :][:length]
    share = torch.zeros(length, dtype=torch.float32, device=value.device)
    share[: mine.numel()] = mine
    if kind is None:
        safe_set_local_fp32_param(parameter, share)
    else:
        safe_set_local_optimizer_state(parameter, share, kind)


def write_forward(parameter: Any, value: Tensor) -> None:
    """The weights of the forward pass, rounded to their type."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.data.copy_(value)
    else:
        parameter.data.copy_(value)
