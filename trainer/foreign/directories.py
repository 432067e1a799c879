"""Every tensor of a file or directory of any format."""

from __future__ import annotations

import os
import pickle
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.manifest import MANIFEST, CheckpointError, read, read_json, sha256_of
from trainer.foreign.files import Foreign, read_file, require_checksums
from trainer.foreign.records import REPORT

FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def read_tensors(path: Path) -> Foreign:
    """Every tensor of a checkpoint of any format, without executing anything in it.

    Accepts safetensors, a state dict or Lightning checkpoint written by torch.save, one of our checkpoint directories,
    or a DeepSpeed checkpoint directory.

    Raises:
        CheckpointError: absent, of no known format, or damaged.
    """
    if not path.exists():
        raise CheckpointError(f"no weights at {path}.")
    return _read_directory(path) if path.is_dir() else read_file(path)


def _read_directory(path: Path) -> Foreign:
    ours = path / "weights.safetensors"
    if ours.is_file():
        expected = _recorded_sha256(path)
        if expected is not None and sha256_of(ours) != expected:
            raise CheckpointError(f"{ours} does not have the sha256 that was recorded beside it: it is damaged. Copy it again.")
        return read_file(ours)
    if (path / "latest").is_file():
        try:
            path = path / (path / "latest").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{path}/latest is not the text that DeepSpeed writes ({error}): name the directory of one checkpoint."
            ) from error
    if any(path.glob("*_optim_states.pt")):
        return Foreign(_read_deepspeed(path))
    if (path / "mp_rank_00_model_states.pt").is_file():  # stage 0 keeps its weights here alone
        return read_file(path / "mp_rank_00_model_states.pt")
    raise CheckpointError(f"{path} is not a checkpoint directory: no weights.safetensors and no DeepSpeed states in it.")


def _recorded_sha256(path: Path) -> str | None:
    """Of weights.safetensors in one of our directories: a checkpoint's, or an import's."""
    if (path / MANIFEST).is_file():
        record = read(path).files.get("weights.safetensors")
        return None if record is None else record.sha256
    if (path / REPORT).is_file():
        report = read_json(path / REPORT)
        return str(report["sha256"]) if isinstance(report, dict) and "sha256" in report else None
    return None


def _read_deepspeed(path: Path) -> dict[str, Tensor]:
    """The fp32 masters of ZeRO 1 to 3, merged by DeepSpeed; only its own three plain classes may be rebuilt."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for file in sorted(path.glob("*.pt")):
        require_checksums(file)
    before = os.environ.get(FORCE_WEIGHTS_ONLY)
    os.environ[FORCE_WEIGHTS_ONLY] = "1"  # the function would otherwise unpickle anything
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]), redirect_stdout(sys.stderr):
            merged = get_fp32_state_dict_from_zero_checkpoint(str(path.parent), path.name)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and plain values, and is not opened.") from error
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        AttributeError,
        AssertionError,
        IndexError,
        TypeError,
        EOFError,
    ) as error:
        raise CheckpointError(f"{path} is no whole DeepSpeed checkpoint ({type(error).__name__}: {error}).") from error
    finally:
        if before is None:
            del os.environ[FORCE_WEIGHTS_ONLY]
        else:
            os.environ[FORCE_WEIGHTS_ONLY] = before
    return {name: tensor.detach() for name, tensor in merged.items()}
