"""`python -m trainer preflight`: everything that can be known before a job is queued, on a login node or one GPU.

Each check says what it found; one that fails says what to do. What needs the job's own ranks (all-reduce within a host,
between two, over all; equal parameters; a first batch each) is checked when the job starts, under the watchdog.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table

from data import locks, variables
from data.store import hash_of, shard_file
from trainer import plan, runtime, start
from trainer.checkpoint import state, store
from trainer.checkpoint.manifest import Progress
from trainer.command import REFUSALS, LaunchError
from trainer.config import Run, load
from trainer.engine import build_engine, resolve_deepspeed, set_learning_rates
from trainer.failing import quieten
from trainer.inputs import Inputs, architecture, open_inputs
from trainer.metrics import normalised_loss, score_evenly, weighted_mse
from trainer.model.topoflow import START_AT_ZERO, TopoFlow
from trainer.telemetry import require_wandb
from trainer.trained import import_weights

REFUSED = (*REFUSALS, OSError, torch.OutOfMemoryError)
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
LEAST_BIAS = 1e-3  # of scores: the highest patch would get 0.1 % less weight than the lowest one; below is F03
REMEDIES: dict[type, str] = {torch.OutOfMemoryError: "a smaller batch.micro, or model.recompute: blocks"}
SAMPLES = 12
SKEW_S = 5.0


class Failed(Exception):
    """A check did not pass: what was found, and what to do."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.remedy = remedy


@dataclass
class Subject:
    """What is examined; each check may leave something for those after it."""

    options: argparse.Namespace
    world: runtime.World
    run: Run | None = None  # as examined here: one rank, its batch alone
    asked: Run | None = None  # as the job will run it
    inputs: Inputs | None = None
    model: TopoFlow | None = None
    engine: Any = None
    deepspeed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    check: str
    state: Literal["pass", "FAIL", "skipped"]
    found: str
    remedy: str = ""
    seconds: float = 0.0


def examine(subject: Subject) -> list[Result]:
    """Run every check; one whose preparation failed is skipped."""
    results = []
    for name, (check, needs) in CHECKS.items():
        started = time.monotonic()
        if any(getattr(subject, need) is None for need in needs):
            results.append(Result(name, "skipped", f"needs {' and '.join(needs)}"))
            continue
        try:
            state, found, remedy = "pass", check(subject), ""
        except Failed as failed:
            state, found, remedy = "FAIL", str(failed), failed.remedy
        except REFUSED as refusal:
            state, found, remedy = "FAIL", str(refusal), REMEDIES.get(type(refusal), "as the message says")
        results.append(Result(name, state, found, remedy, time.monotonic() - started))  # type: ignore[arg-type]
    return results


def check_environment(subject: Subject) -> str:
    harmful = [f"{name}={os.environ[name]} ({why})" for name, (pattern, why) in HARMFUL.items()
               if name in os.environ and re.fullmatch(pattern, os.environ[name])]  # fmt: skip
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
        raise Failed(f"{script} starts {asked['nodes']} x {asked['ntasks-per-node']} ranks on {asked['gpus-per-node']} GPUs a "
                     f"node; --world-size is {subject.options.world_size}", "make them agree, one rank a GPU")  # fmt: skip
    return f"{asked['nodes']} nodes x {asked['ntasks-per-node']} ranks"


def check_data(subject: Subject) -> str:
    assert subject.run
    inputs = open_inputs(subject.run, subject.world.device)
    index = inputs.index("train")
    counts = {split: len(inputs.index(split)) for split in ("train", "validation")}
    rng = np.random.default_rng(subject.run.seed)
    started = time.monotonic()
    for _ in inputs.stream(index).listed(rng.integers(0, len(index), SAMPLES), 1):
        pass
    rate = SAMPLES / (time.monotonic() - started)
    recorded = inputs.store.shard_hashes()
    chosen = sorted(recorded)[int(rng.integers(len(recorded)))]
    shard = inputs.store.path / shard_file(chosen)
    if hash_of(shard) != recorded[chosen]:
        raise Failed(f"{shard} is not what was written", f"python -m data verify {inputs.store.path}")
    subject.inputs = inputs
    return (f"fingerprint {inputs.store.fingerprint[:12]}, {counts['train']} training and {counts['validation']} validation "
            f"samples, {rate:.0f} samples/s here")  # fmt: skip


def check_statistics(subject: Subject) -> str:
    assert subject.inputs
    inputs = subject.inputs
    index = inputs.index("train")
    chosen = np.random.default_rng(0).integers(0, len(index), 4 * SAMPLES)
    fields = torch.cat([inputs.normalizer(batch.to(inputs.device)).inputs for batch in inputs.stream(index).listed(chosen, 1)])
    strange = []
    for channel, name in enumerate(inputs.normalizer.inputs):
        mean, std = float(fields[:, channel].mean()), float(fields[:, channel].std())
        if abs(mean) > 1.5 or not 0.2 < std < 4.0:
            strange.append(f"{name}: normalised mean {mean:+.2f}, deviation {std:.2f}")
        typical, own = variables.BY_NAME[name].typical, inputs.store.statistics[name]["mean"]
        if typical is not None and not 0.3 * typical[0] <= own <= 3.0 * typical[1]:
            strange.append(f"{name}: mean {own:.4g} {variables.BY_NAME[name].units}, usual {typical[0]:g} .. {typical[1]:g}")
    if strange:
        raise Failed("; ".join(strange), "the statistics are not of this data, or a unit is wrong: prepare the store again")
    return f"{len(inputs.normalizer.inputs)} inputs have about mean 0 and deviation 1"


def check_scan(subject: Subject) -> str:
    assert subject.inputs
    if subject.inputs.scan is None:
        return f"mode {subject.inputs.run.wind_scan.mode}, no cache"
    usable = subject.inputs.scan.usable(subject.inputs.run.wind_scan.mode).mean()
    if usable < 0.5:
        raise Failed(f"{100 * usable:.0f} % of the hours have a wind", "look for gaps with `python -m data inspect`")
    return f"orders {subject.inputs.scan.orders_hash[:12]}, {100 * usable:.1f} % of the hours have a wind"


def check_weights(subject: Subject) -> str:
    assert subject.run
    torch.manual_seed(subject.run.seed)
    model = TopoFlow(architecture(subject.run))
    if subject.run.init_from is None:
        found = f"{sum(p.numel() for p in model.parameters()):,} parameters, random"
    else:
        tensors, report = import_weights(model, subject.run.init_from.path, subject.run.init_from.allow_missing)
        report.refuse_unless_complete()
        model.load_state_dict({**model.state_dict(), **tensors})
        found = f"{100 * report.share:.2f} % of the parameters from {subject.run.init_from.path}"
    subject.model = model.to(subject.world.device)
    return found


def check_initialisation(subject: Subject) -> str:
    assert subject.model
    wrong = []
    for name, tensor in subject.model.named_parameters():
        parameter, leaf = tensor.detach(), name.rsplit(".", 1)[-1]
        if not bool(torch.isfinite(parameter).all()):
            wrong.append(f"{name} is not finite")
        elif parameter.dim() > 1 and leaf not in START_AT_ZERO and float(parameter.std()) == 0.0:
            wrong.append(f"{name} is {float(parameter.flatten()[0]):g} everywhere")
    if wrong:
        raise Failed("; ".join(wrong), "compare with trainer/model/topoflow.py: an initialisation was lost, or the file is bad")
    return "every matrix and embedding varies and is finite"


def check_step(subject: Subject) -> str:
    assert subject.run
    assert subject.inputs
    assert subject.model
    device = subject.world.device
    own = state.Named({name: tensor.detach().float().cpu().clone() for name, tensor in subject.model.state_dict().items()})
    engine = build_engine(subject.model, subject.run, subject.deepspeed)
    start.load(engine, start.Start(Progress(), named=own))
    _, example, arguments = next(prepared(subject))
    started = time.monotonic()
    loss = weighted_mse(engine(*arguments), example.targets, example.weight).mean()
    engine.backward(loss)
    set_learning_rates(engine, 0, subject.run)
    engine.step()
    value = float(loss.detach())
    seconds = time.monotonic() - started
    if not np.isfinite(value):
        raise Failed(f"the loss is {value}", "look at the store with `python -m data inspect`, and at the initial weights")
    broken = [name for name, p in engine.module.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken:
        raise Failed(f"not finite after one step: {', '.join(broken[:4])}", "lower optimizer.lr")
    subject.engine = engine
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return f"loss {value:.4f}, {seconds:.1f} s" + (f", {memory:.2f} GB" if memory is not None else f" on this {device.type}")


def prepared(subject: Subject) -> Any:
    """One validation sample: (batch, example, arguments of the model)."""
    assert subject.inputs
    index = subject.inputs.index("validation")
    stream = subject.inputs.stream(index)
    return (subject.inputs.prepare(batch) for batch in stream.listed(index.evenly(1)[:1], 1))


def check_first_loss(subject: Subject) -> str:
    assert subject.run
    assert subject.inputs
    assert subject.model
    expect = subject.run.expect
    if expect is None:
        return "no `expect` in the configuration"
    held_out = subject.inputs.stream(subject.inputs.index("validation"))
    loss = normalised_loss(score_evenly(subject.model.eval(), held_out, subject.inputs), subject.inputs.normalizer)
    subject.model.train()
    if abs(loss - expect.val_loss) > expect.tolerance:
        raise Failed(f"validation loss {loss:.4f}, expected {expect.val_loss} +- {expect.tolerance}",
                     "the job would be refused: start it on one rank to see which cause fits")  # fmt: skip
    return f"validation loss {loss:.4f}, expected {expect.val_loss} +- {expect.tolerance}"


def check_sensitivity(subject: Subject) -> str:
    """Toggling each physics feature must change the output; legacy scans carry theirs inside the model's arguments."""
    assert subject.run
    assert subject.inputs
    assert subject.model
    if subject.run.wind_scan.mode == "legacy":
        return "not examined in legacy mode"
    model = subject.model.eval()
    _, _, (x, lead, elevation, rank) = next(prepared(subject))
    with torch.no_grad():
        plain = model(x, lead, elevation, rank)
        changes = {}
        if subject.run.wind_scan.mode != "none":
            tokens = rank.shape[1]
            changes["wind scan"] = model(x, lead, elevation, tokens - 1 - rank)
        if subject.run.model.elevation_bias:
            changes["elevation bias"] = model(x, lead, torch.zeros_like(elevation), rank)
    model.train()
    scale = float(plain.std())
    shares = {name: float((other - plain).abs().max()) / scale for name, other in changes.items()}
    dead = [name for name, share in shares.items() if share == 0.0]
    said = ", ".join(f"{name} changes the output by up to {share:.2g} deviations" for name, share in shares.items())
    if subject.run.model.elevation_bias:
        alpha = next(float(p.detach()) for name, p in model.named_parameters() if name.endswith("elevation_alpha"))
        low = -alpha * float(elevation.max() - elevation.min()) / 1000.0
        said += f"; the bias spans {min(low, 0.0):.3g} .. {max(low, 0.0):.3g}"
        if abs(low) < LEAST_BIAS and "elevation bias" not in dead:
            dead.append(f"elevation bias (it spans {abs(low):.2g}, less than {LEAST_BIAS})")
    if dead:
        raise Failed(f"{' and '.join(dead)} changes nothing", "the feature cannot act: look at alpha_init, the elevation and "
                     "the wind-scan cache before spending GPU-hours on it")  # fmt: skip
    return said or "no physics feature is on"


def check_checkpoint(subject: Subject) -> str:
    """Write a checkpoint as the run would, read it back, load it, and compare."""
    assert subject.run
    assert subject.inputs
    assert subject.engine
    folder = subject.run.run_dir / "preflight"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        started = time.monotonic()
        memory = start.remember(subject.run, subject.inputs, subject.engine.module, Progress(), subject.deepspeed, 1)
        saving = store.Saving(folder, memory, state.capture(subject.engine))
        path = saving.commit()
        written = time.monotonic() - started
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        wrong = store.verify(path)
        recorded = store.manifest(path).tensors
        if wrong or state.changed(store.load(path), recorded):
            raise Failed(f"what was read from {folder} is not what was written: {wrong}", "do not train on this file system")
        start.load(subject.engine, start.Start(Progress(), path, store.load(path), recorded))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return f"{size / 1e6:.0f} MB written, read and compared; written in {written:.1f} s"


def check_resume(subject: Subject) -> str:
    """What the job would refuse of the checkpoints in its run directory, it refuses here."""
    options = subject.options
    assert subject.asked
    assert subject.inputs
    assert subject.model
    deepspeed = resolve_deepspeed(options.deepspeed_config, subject.asked, options.world_size)
    present = start.remember(subject.asked, subject.inputs, subject.model, Progress(), deepspeed, options.world_size)
    found, progress = start.look_back(subject.asked, present, options.allow_change)
    if found is not None:
        return f"continues from {found} at step {progress.step} of {subject.asked.steps}"
    other = start.of_another_directory(subject.asked.run_dir, options.config)
    if other is not None:
        raise Failed(f"{subject.asked.run_dir} holds no checkpoint, but {other} does", "start from the directory that "
                     f"the run was started from, or set run_dir={other}")  # fmt: skip
    return f"no checkpoint in {subject.asked.run_dir}: starts at step 0"


def check_run_directory(subject: Subject) -> str:
    """The real lock and the real write, in the real directory."""
    assert subject.asked
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
    options = subject.options
    run = load(options.config, options.overrides)
    stage = subject.deepspeed["zero_optimization"]["stage"]
    needed = plan.state_bytes(plan.parameters_of(run), run.precision, stage, options.world_size) + plan.activation_bytes(run)
    if options.gpu is None:
        return f"about {needed / 1e9:.2f} GB a rank under ZeRO {stage} (compare with --gpu)"
    gpu = plan.GPUS[options.gpu]
    if needed > 0.95 * gpu.memory:
        raise Failed(f"about {needed / 1e9:.1f} GB a rank under ZeRO {stage}, {gpu.title} has {gpu.memory / 1e9:.0f} GB",
                     "a smaller batch.micro, model.recompute: blocks, or a higher ZeRO stage")  # fmt: skip
    return f"about {needed / 1e9:.2f} GB a rank under ZeRO {stage} of {gpu.memory / 1e9:.0f} GB"


def check_clock(subject: Subject) -> str:
    """The file system's clock against this host's: reports and locks are compared by time."""
    assert subject.run
    subject.run.run_dir.mkdir(parents=True, exist_ok=True)
    probe = subject.run.run_dir / f".clock-{os.getpid()}"
    probe.write_text("")
    skew = probe.stat().st_mtime - time.time()
    probe.unlink()
    if abs(skew) > SKEW_S:
        raise Failed(f"the clock of {subject.run.run_dir} is {skew:+.0f} s from that of {socket.gethostname()}",
                     "have the clocks synchronised (chrony, ntp)")  # fmt: skip
    return f"{skew:+.2f} s between {socket.gethostname()} and its file system"


def check_space(subject: Subject) -> str:
    assert subject.run
    run = subject.run
    kept = run.checkpoint.keep_last + 3 + (run.steps // run.checkpoint.keep_every if run.checkpoint.keep_every else 0)
    needed = kept * plan.checkpoint_bytes(plan.parameters_of(run))
    free = shutil.disk_usage(next(p for p in [run.run_dir, *run.run_dir.parents] if p.exists())).free
    if needed > free:
        raise Failed(f"{kept} checkpoints need {needed / 1e9:.1f} GB, {run.run_dir} has {free / 1e9:.1f} GB free",
                     "make room, or lower checkpoint.keep_last or raise checkpoint.keep_every")  # fmt: skip
    return f"{kept} checkpoints of {needed / kept / 1e6:.0f} MB need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


CHECKS: dict[str, tuple[Callable[[Subject], str], tuple[str, ...]]] = {
    "environment": (check_environment, ()),
    "configuration": (check_configuration, ()),
    "launch script": (check_launch_script, ()),
    "run directory": (check_run_directory, ("run",)),
    "clock": (check_clock, ("run",)),
    "space": (check_space, ("run",)),
    "memory": (check_memory, ("run",)),
    "data": (check_data, ("run",)),
    "statistics": (check_statistics, ("inputs",)),
    "wind scan": (check_scan, ("inputs",)),
    "initial weights": (check_weights, ("run",)),
    "initialisation": (check_initialisation, ("model",)),
    "resume": (check_resume, ("inputs", "model")),
    "first loss": (check_first_loss, ("inputs", "model")),
    "sensitivity": (check_sensitivity, ("inputs", "model")),
    "step": (check_step, ("inputs", "model")),
    "checkpoint": (check_checkpoint, ("engine",)),
}


def show(results: list[Result], console: Console) -> None:
    table = Table("check", "", "s", Column("found", overflow="fold"), Column("remedy", overflow="fold"), title="preflight")
    style = {"pass": "green", "FAIL": "bold red", "skipped": "yellow"}
    for r in results:
        table.add_row(r.check, f"[{style[r.state]}]{r.state}[/]", f"{r.seconds:.1f}", r.found, r.remedy)
    console.print(table)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m trainer preflight --config launch/configs/demo.yaml --world-size 2\n"
        "  python -m trainer preflight --config launch/configs/china_128x256.yaml --world-size 400 --gpu h200 \\\n"
        "      --script launch/slurm.sbatch",
    )  # fmt: skip
    parser.add_argument("--config", required=True, type=Path)
    default = Path(__file__).parents[1] / "ds_configs" / "zero1.json"
    parser.add_argument("--deepspeed_config", type=Path, default=default, help="default ds_configs/zero1.json")
    parser.add_argument("--world-size", type=int, default=1, help="ranks of the job (default 1)")
    parser.add_argument("--gpu", choices=plan.GPUS, help="what the ranks will run on")
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="as the job will be started with")
    parser.add_argument("--script", type=Path, help="the batch script, whose numbers are compared")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    console = Console(width=max(140, Console().width))
    try:
        quieten(0)
        results = examine(Subject(options, runtime.join(10.0)))
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        runtime.leave()
    show(results, console)
    failed = [r.check for r in results if r.state == "FAIL"]
    console.print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0
