"""Checks of what a job is started with: settings, script, directory, memory, room."""

from __future__ import annotations

import os
import re
import shutil
import socket
import time

import torch

from data.process import locks
from trainer.config_file import load, require_wandb
from trainer.engine import resolve_deepspeed
from trainer.preflight import plan
from trainer.preflight.report import Failed, Subject

# variable -> (pattern of a harmful value, why)
HARMFUL = {
    "NCCL_IB_DISABLE": ("1", "no InfiniBand: large jobs crawl or crash"),
    "NCCL_NET_PLUGIN": ("none", "no network plugin: large jobs crash"),
    "NCCL_P2P_DISABLE": ("1", "no direct copies between the GPUs of a node"),
    "NCCL_DEBUG": ("TRACE", "floods the logs of all ranks"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": ("0", "a broken collective hangs for ever"),
    "CUDA_LAUNCH_BLOCKING": ("1", "every kernel waits"),
    "HIP_LAUNCH_BLOCKING": ("1", "every kernel waits"),
    "AMD_SERIALIZE_KERNEL": ("[1-3]", "every kernel waits"),
    "MIOPEN_USER_DB_PATH": (r"(?!/tmp|/dev/shm|/var/tmp).*", "on a file system shared by nodes its SQLite files lock"),
    "MIOPEN_CUSTOM_CACHE_DIR": (r"(?!/tmp|/dev/shm|/var/tmp).*", "on a file system shared by nodes it locks"),
    "TRITON_CACHE_DIR": (r"(?!/tmp|/dev/shm|/var/tmp).*", "all nodes write one cache at once"),
}
SKEW_S = 5.0


def check_environment(subject: Subject) -> str:
    harmful = [
        f"{name}={os.environ[name]} ({why})"
        for name, (pattern, why) in HARMFUL.items()
        if name in os.environ and re.fullmatch(pattern, os.environ[name])
    ]
    if torch.version.hip and "MIOPEN_USER_DB_PATH" not in os.environ:
        harmful.append("MIOPEN_USER_DB_PATH is not set (the home directory, shared by all nodes, is used)")
    if harmful:
        raise Failed("; ".join(harmful), "unset them, or source launch/env/nvidia.sh or lumi.sh")
    return f"none of {len(HARMFUL)} known harmful settings"


def check_configuration(subject: Subject) -> str:
    options = subject.options
    run = load(options.config, options.overrides)
    accumulation = run.batch.accumulation(options.world_size)
    resolve_deepspeed(options.deepspeed_config, run, options.world_size)
    require_wandb(run)
    subject.asked = run
    if torch.cuda.is_available():
        alone = run.model_copy(update={"batch": run.batch.model_copy(update={"total": run.batch.micro})})
    else:  # a CPU takes minutes for what a GPU does in a second
        alone = run.model_copy(update={"batch": run.batch.model_copy(update={"total": 1, "micro": 1}), "precision": "fp32"})
    subject.deepspeed = resolve_deepspeed(options.deepspeed_config, alone, 1)
    subject.run = alone
    return f"batch {run.batch.total} = {run.batch.micro} x {accumulation} x {options.world_size} ranks, {run.steps} steps"


def check_launch_script(subject: Subject) -> str:
    script = subject.options.script
    if script is None:
        return "no --script given"
    asked = dict(re.findall(r"^#SBATCH --(nodes|ntasks-per-node|gpus-per-node)=(\d+)", script.read_text(), re.MULTILINE))
    if len(asked) < 3:
        raise Failed(f"{script} does not state nodes, ntasks-per-node and gpus-per-node", "start from launch/slurm.sbatch")
    ranks = int(asked["nodes"]) * int(asked["ntasks-per-node"])
    if ranks != subject.options.world_size or asked["ntasks-per-node"] != asked["gpus-per-node"]:
        raise Failed(
            f"{script} starts {asked['nodes']} x {asked['ntasks-per-node']} ranks on {asked['gpus-per-node']} GPUs a "
            f"node; --world-size is {subject.options.world_size}",
            "make them agree, one rank a GPU",
        )
    return f"{asked['nodes']} nodes x {asked['ntasks-per-node']} ranks"


def check_run_directory(subject: Subject) -> str:
    """The real lock and the real write, in the real directory."""
    run_dir = subject.asked.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    holder = locks.holder(run_dir / "lock")
    if holder is not None:
        raise Failed(f"{run_dir} is being trained by {holder}", "end that first, or choose another run_dir")
    probe = run_dir / f".lock-{os.getpid()}"
    with locks.hold(probe):
        if locks.holder(probe) is None:
            raise Failed(f"a lock made in {run_dir} is not seen there", "choose a run_dir on another file system")
    return f"{run_dir} can be written and locked"


def check_memory(subject: Subject) -> str:
    options, run = subject.options, subject.asked
    stage = subject.deepspeed["zero_optimization"]["stage"]
    needed = plan.state_bytes(
        plan.parameters_of(run), run.precision, stage, options.world_size, run.ema is not None
    ) + plan.activation_bytes(run)
    if options.gpu is None:
        return f"about {needed / 1e9:.2f} GB a rank under ZeRO {stage} (compare with --gpu)"
    gpu = plan.GPUS[options.gpu]
    if needed > 0.95 * gpu.memory:
        raise Failed(
            f"about {needed / 1e9:.1f} GB a rank under ZeRO {stage}, {gpu.title} has {gpu.memory / 1e9:.0f} GB",
            "a smaller batch.micro, model.recompute: blocks, or a higher ZeRO stage",
        )
    return f"about {needed / 1e9:.2f} GB a rank under ZeRO {stage} of {gpu.memory / 1e9:.0f} GB"


def check_clock(subject: Subject) -> str:
    """The file system's clock against this host's: reports and locks are compared by time."""
    subject.run.run_dir.mkdir(parents=True, exist_ok=True)
    probe = subject.run.run_dir / f".clock-{os.getpid()}"
    probe.write_text("")
    skew = probe.stat().st_mtime - time.time()
    probe.unlink()
    if abs(skew) > SKEW_S:
        raise Failed(
            f"the clock of {subject.run.run_dir} is {skew:+.0f} s from that of {socket.gethostname()}",
            "have the clocks synchronised (chrony, ntp)",
        )
    return f"{skew:+.2f} s between {socket.gethostname()} and its file system"


def check_space(subject: Subject) -> str:
    run = subject.run
    kept = run.checkpoint.keep_last + 3 + (run.steps // run.checkpoint.keep_every if run.checkpoint.keep_every else 0)
    needed = kept * plan.checkpoint_bytes(plan.parameters_of(run), run.ema is not None)
    free = shutil.disk_usage(next(p for p in [run.run_dir, *run.run_dir.parents] if p.exists())).free
    if needed > free:
        raise Failed(
            f"{kept} checkpoints need {needed / 1e9:.1f} GB, {run.run_dir} has {free / 1e9:.1f} GB free",
            "make room, or lower checkpoint.keep_last or raise checkpoint.keep_every",
        )
    return f"{kept} checkpoints of {needed / kept / 1e6:.0f} MB need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
