"""The weights in a directory that others wrote: DeepSpeed's states, or shards with an index."""

from __future__ import annotations

import os
import pickle
import sys
from contextlib import redirect_stdout
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from data.given.pickles import Described, Harmful, Inert, require_harmless, resolved
from trainer.checkpoint.manifest import CheckpointError, read_json
from trainer.weights.files import BAD_VALUES, load_pickled, read_file
from trainer.weights.sets import Sets, sets_in

FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# Files that hold all weights; the last is DeepSpeed's at stage 0.
WHOLE = ("model.safetensors", "pytorch_model.bin", "mp_rank_00_model_states.pt")
OF_ENUMS = "builtins.getattr"  # by which Python 3.11.0 to 3.11.3 pickles the values of enumerations
# What merging files that are no shards of DeepSpeed can raise.
BROKEN = (*BAD_VALUES, OSError, EOFError)


def read_directory(path: Path) -> Sets:
    """The sets of weights in a directory.

    Raises:
        Unreadable: the file system refuses it now.
        CheckpointError: there are none, they are not of one save, or a file wants to run something.
    """
    if (path / "latest").is_file():
        path = path / _latest(path / "latest")
    indices = sorted(path.glob("*.index.json"))
    if indices:
        return sets_in(_read_indexed(indices[0]))
    if any(path.glob("*_optim_states.pt")):
        return sets_in(_read_deepspeed(path))
    for name in WHOLE:
        if (path / name).is_file():
            return read_file(path / name)
    if (path / ".metadata").is_file():
        raise CheckpointError(
            f"{path} is a distributed checkpoint of torch, described by a pickle that would be "
            "executed. Where you trust it, make one file of it:\n"
            f"  python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE.pt"
        )
    raise CheckpointError(
        f"{path} is not a checkpoint directory: it holds no weights.safetensors, no index of "
        "shards and no states of DeepSpeed. Name a run, one of its checkpoints, or a file of "
        "weights."
    )


def _latest(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        why = f"{file} is not the text that DeepSpeed writes ({error})"
        raise CheckpointError(f"{why}: name the directory of one checkpoint.") from error


def _read_indexed(index: Path) -> dict[str, Tensor]:
    """Shards as the `weight_map` of an index names them."""
    tree = read_json(index)
    named = tree.get("weight_map") if isinstance(tree, dict) else None
    files = list(named.values()) if isinstance(named, dict) else []
    if not isinstance(named, dict) or any(Path(str(file)).name != file for file in files):
        raise CheckpointError(f"{index} has no weight_map of names to files beside it.")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files)):
        shard = read_file(index.with_name(file)).chosen(raw=True)[1]
        tensors |= {name: tensor for name, tensor in shard.items() if named.get(name) == file}
    absent = sorted(named.keys() - tensors.keys())
    if absent:
        raise CheckpointError(f"{index}: {absent[0]} (of {len(absent)}) is not in its shard.")
    return tensors


def _read_deepspeed(path: Path) -> dict[str, Tensor]:
    """The fp32 masters of ZeRO 1 to 3, merged by DeepSpeed, once the shards are of one save."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    files = sorted(path.glob("*.pt"))
    shards = {file.name: load_pickled(file) for file in files}
    _require_one_save(path, shards)
    known = [LossScaler, ZeroStageEnum, fragment_address]
    named = {f"{kind.__module__}.{kind.__qualname__}" for kind in known}
    asked = {x for file in files for x in get_unsafe_globals_in_checkpoint(file)}
    foreign = asked - named - {OF_ENUMS}
    before = os.environ.get(FORCE_WEIGHTS_ONLY)
    os.environ[FORCE_WEIGHTS_ONLY] = "1"  # the function would otherwise unpickle anything
    try:
        for name in foreign:
            require_harmless(*name.rsplit(".", 1))
        allowed = [*known, (_member, OF_ENUMS), *((Inert, name) for name in foreign)]
        with safe_globals(allowed), redirect_stdout(sys.stderr):
            merged = get_fp32_state_dict_from_zero_checkpoint(str(path.parent), path.name)
    except (pickle.UnpicklingError, Harmful) as error:
        why = "holds more than tensors and plain values, and is not opened"
        raise CheckpointError(f"{path} {why} ({error}).") from error
    except BROKEN as error:
        why = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is no whole DeepSpeed checkpoint ({why}).") from error
    finally:
        if before is None:
            del os.environ[FORCE_WEIGHTS_ONLY]
        else:
            os.environ[FORCE_WEIGHTS_ONLY] = before
    masters = {name: tensor.detach() for name, tensor in merged.items()}
    for content in shards.values():
        _require_rounded(path, masters, content)
    return masters


def _member(kind: Any, name: str) -> Any:
    """One value of an enumeration; of anything else, nothing is looked up."""
    return kind[name] if isinstance(kind, type) and issubclass(kind, Enum) else Inert()


def _require_one_save(path: Path, shards: dict[str, Any]) -> None:
    """Compare what every shard says of itself: its step, the number of ranks, its sizes.

    Raises:
        CheckpointError: two shards are of different saves.
    """
    said: dict[str, tuple[str, Any]] = {}  # what -> the first file that says it, and what it says
    for name, content in shards.items():
        for what, value in _said_by(content).items():
            first, then = said.setdefault(what, (name, value))
            if value != then:
                raise _torn(path, f"{what} is {then} in {first} and {value} in {name}")


def _require_rounded(path: Path, masters: dict[str, Tensor], content: Any) -> None:
    """The weights that one file holds whole below stage 3 are the masters in another type.

    Raises:
        CheckpointError: they are of different saves.
    """
    module = content.get("module") if isinstance(content, dict) else None
    for name, value in module.items() if isinstance(module, dict) else ():
        if name not in masters or not isinstance(value, Tensor | Described):
            continue
        weight, master = resolved(value), masters[name]
        if weight.shape == master.shape and not torch.equal(master.to(weight.dtype), weight):
            raise _torn(path, f"'{name}' differs between states of the optimizer and the model")


def _torn(path: Path, why: str) -> CheckpointError:
    remedy = "Copy the directory again, or take an older checkpoint."
    return CheckpointError(f"the shards in {path} are not of one save: {why}. {remedy}")


def _said_by(content: Any) -> dict[str, Any]:
    """What a shard states of its save, of those things in which all shards of one save agree."""
    if not isinstance(content, dict):
        return {}
    said = {key: content[key] for key in ("global_steps", "dp_world_size") if key in content}
    state = content.get("optimizer_state_dict")
    if not isinstance(state, dict):
        return said
    if isinstance(state.get("partition_count"), list | int):
        said["partition_count"] = state["partition_count"]
    inner = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    entries = inner.get("state") if isinstance(inner, dict) else inner
    parts = entries.values() if isinstance(entries, dict) else entries or ()
    for part in (part for part in parts if isinstance(part, dict)):
        count, moment = part.get("step"), part.get("exp_avg")
        if isinstance(count, Tensor | Described):
            said["the optimizer's step"] = float(resolved(count))
        if isinstance(moment, Tensor | Described):
            size = moment.size if isinstance(moment, Described) else tuple(moment.shape)
            said["the size of a share"] = [*said.get("the size of a share", []), size]
    return said
