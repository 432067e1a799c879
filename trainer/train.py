"""THE loop: `deepspeed --num_gpus 2 trainer/train.py --config launch/configs/demo.yaml`; read it top to bottom."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data import DataError
from data.batch import Batch
from trainer import engine as engines
from trainer import runtime
from trainer.checkpoint import resume, store
from trainer.checkpoint.store import CheckpointError
from trainer.config import ConfigError, Run, dump, load
from trainer.inputs import Inputs, architecture, open_inputs
from trainer.metrics import normalised_loss, score, weighted_mse
from trainer.model.attention import kernel_name
from trainer.model.topoflow import TopoFlow
from trainer.telemetry import Telemetry

log = logging.getLogger("trainer")
EXIT_WRONG = 2  # configuration, data or checkpoint refused
EXIT_STOPPED = 75  # stopped on request after saving; start again to continue
Refusals = (ConfigError, DataError, CheckpointError, runtime.LaunchError)


class TrainingError(Exception):
    """Training itself went wrong: the loss is not finite, or not what was expected."""


@dataclass
class Progress:
    """The whole state of a run beside weights and optimizer; dropout is seeded by position in the stream."""

    step: int = 0
    samples_seen: int = 0
    best_val_loss: float = float("inf")
    val_loss: float | None = None


def train(run: Run, deepspeed_path: Path, world: runtime.World) -> bool:
    """Train until `run.steps`; True when finished, False when stopped on request.

    Raises:
        DataError, CheckpointError, ConfigError: refused before step 1.
        TrainingError: non-finite loss, or a step-0 validation loss other than expected.
    """
    deepspeed_config = engines.resolve_deepspeed(deepspeed_path, run, world.size)
    stop = runtime.StopVote(run.run_dir)
    inputs = open_inputs(run, world.device)
    samples = inputs.index("train")

    torch.manual_seed(run.seed)  # every rank builds the same weights
    model = TopoFlow(architecture(run))
    engine = engines.build_engine(model, run, deepspeed_config, world)
    progress = restore(engine, run, inputs, world)
    describe(run, inputs, world, engine, len(samples))
    if progress.step >= run.steps:
        log.info("already at step %d of %d: nothing to do", progress.step, run.steps)
        return True
    if progress.step == 0:
        validate(engine, inputs, progress, world)
        check_expectation(run, progress)
        log.info("step 0: validation loss %.4f", progress.val_loss)

    accumulation = run.batch.accumulation(world.size)
    batches = inputs.stream(samples).training(progress.samples_seen, run.batch.micro, accumulation, world.size, world.rank)
    window = Window(inputs)
    stopping = False
    with Telemetry(run, progress.step) if world.is_main else nullcontext() as telemetry:
        if telemetry and progress.step == 0:
            telemetry.record("validation", 0, {"loss": progress.val_loss or 0.0})
        while progress.step < run.steps and not stopping:
            stop.cast()
            lr = engines.set_learning_rates(engine, progress.step, run)
            take_step(engine, batches, accumulation, inputs, window, run.seed)
            progress.step += 1
            progress.samples_seen += run.batch.total
            stopping = stop.agreed()

            last = progress.step == run.steps
            saving = last or stopping or progress.step % run.checkpoint.every == 0
            if saving or progress.step % run.telemetry.every == 0:
                metrics = window.summary(engine, lr, run.batch.total)
                if telemetry:
                    telemetry.status(progress.step, metrics)
            if last or progress.step % run.validation.every == 0:
                scores = validate(engine, inputs, progress, world)
                if telemetry:
                    telemetry.record("validation", progress.step, scores)
                    log.info(
                        "step %d: validation loss %.4f, best %.4f", progress.step, progress.val_loss, progress.best_val_loss
                    )
                window.restart_clock()
            if saving:
                save(engine, run, inputs, progress, world)
                window.restart_clock()
    if stopping and progress.step < run.steps:
        log.info(
            "stopped at step %d (%s); start the same command again to continue", progress.step, stop.reason or "another rank"
        )
    return progress.step == run.steps


def take_step(engine: Any, batches: Iterator[Batch], accumulation: int, inputs: Inputs, window: Window, seed: int) -> None:
    """One optimizer step: accumulate the gradients of this rank's micro-batches, clip, update."""
    for _ in range(accumulation):
        waiting = time.perf_counter()
        batch, example, arguments = inputs.prepare(next(batches))
        window.waited += time.perf_counter() - waiting
        # Dropout depends on the place in the stream alone: a resumed run, on any number of ranks, draws the same.
        torch.manual_seed((seed << 40) + batch.position)
        losses = weighted_mse(engine(*arguments), example.targets, example.weight)
        engine.backward(losses.mean())
        engine.step()
        window.add(losses.detach(), example.missing_inputs, batch)


@dataclass
class Window:
    """What happened since the last status line; read from the device once, in `summary`."""

    inputs: Inputs
    waited: float = 0.0
    losses: list[torch.Tensor] = field(default_factory=list)
    missing: list[torch.Tensor] = field(default_factory=list)
    batches: list[tuple[Any, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def add(self, losses: torch.Tensor, missing: torch.Tensor, batch: Batch) -> None:
        self.losses.append(losses)
        self.missing.append(missing)
        self.batches.append((batch.hours, batch.lead_hours))

    def restart_clock(self) -> None:
        """Leave the time since the last summary out of the next throughput."""
        if not self.losses:
            self.started = time.perf_counter()

    def summary(self, engine: Any, lr: float, total: int) -> dict[str, float]:
        """Means over the window and all ranks; empties the window.

        Raises:
            TrainingError: a loss is not finite; the ranks that saw it name the samples.
        """
        stacked = torch.stack([torch.cat([loss, share[None]]) for loss, share in zip(self.losses, self.missing, strict=True)])
        mean = stacked.mean(0)
        dist.all_reduce(mean)
        mean = mean / dist.get_world_size()
        if not torch.isfinite(mean).all():
            self._name_bad_samples(stacked)
        seconds = time.perf_counter() - self.started
        steps = len(self.losses) / engine.gradient_accumulation_steps()
        *losses, missing = mean.tolist()
        names = self.inputs.normalizer.targets
        metrics = {"loss": sum(losses) / len(losses)} | {f"loss_{n}": x for n, x in zip(names, losses, strict=True)}
        metrics |= {
            "lr": lr, "grad_norm": float(engine.get_global_grad_norm() or 0.0), "missing_inputs": missing,
            "samples_per_s": steps * total / seconds, "data_wait_share": self.waited / seconds,
        }  # fmt: skip
        alpha = read_alpha(engine)
        if alpha is not None:
            metrics["elevation_alpha"] = alpha
        self.losses, self.missing, self.batches, self.waited = [], [], [], 0.0
        self.started = time.perf_counter()
        return metrics

    def _name_bad_samples(self, stacked: torch.Tensor) -> None:
        times = self.inputs.store.times
        for row in (~torch.isfinite(stacked).all(1)).nonzero().flatten().tolist():
            hours, leads = self.batches[row]
            named = ", ".join(f"{times[t]}+{int(h)}h" for t, h in zip(hours, leads, strict=True))
            log.error("non-finite loss in the micro-batch of %s", named)
        raise TrainingError(
            "the loss is not finite; the ranks that saw it named their samples above. The last checkpoint is intact: "
            "inspect those hours of the store, or lower optimizer.lr."
        )


def read_alpha(engine: Any) -> float | None:
    """The learned elevation_alpha, from the fp32 masters; collective under ZeRO 3."""
    from deepspeed.utils import safe_get_full_fp32_param

    alpha = engine.module.blocks[0].attn.elevation_alpha
    if alpha is None:
        return None
    full = safe_get_full_fp32_param(alpha)
    return float(alpha if full is None else full)


def validate(engine: Any, inputs: Inputs, progress: Progress, world: runtime.World) -> dict[str, float]:
    """Score the fixed validation samples, sharing them over ranks, and remember the loss."""
    index = inputs.index("validation")
    numbers = index.evenly(inputs.run.validation.samples)
    engine.eval()
    sums = score(engine, inputs.stream(index).listed(numbers, inputs.run.batch.micro, world.size, world.rank), inputs)
    engine.train()
    sums.all_reduce()
    progress.val_loss = normalised_loss(sums, inputs.normalizer)
    progress.best_val_loss = min(progress.best_val_loss, progress.val_loss)
    table = sums.table()
    scores = {"loss": progress.val_loss}
    for row, name in enumerate(inputs.normalizer.targets):
        for column, lead in enumerate(sums.lead_hours):
            scores |= {f"{kind}_{name}_{lead}h": float(table[kind][row, column]) for kind in ("rmse", "skill")}
    return scores


def check_expectation(run: Run, progress: Progress) -> None:
    if run.expect is None or progress.val_loss is None:
        return
    difference = abs(progress.val_loss - run.expect.val_loss)
    if not difference <= run.expect.tolerance:
        raise TrainingError(
            f"step-0 validation loss is {progress.val_loss:.4f}, expected {run.expect.val_loss} +- {run.expect.tolerance}. "
            "Usual causes: weights not loaded, other statistics, another wind-scan cache, another validation set."
        )


def memory(run: Run, inputs: Inputs, progress: Progress, world: runtime.World, zero_stage: int) -> dict[str, Any]:
    """What the checkpoint's manifest says beside its files."""
    return {
        **asdict(progress), "config": run.model_dump(mode="json"), "fingerprints": inputs.fingerprints(),
        "statistics": inputs.store.statistics, "world_size": world.size, "zero_stage": zero_stage,
    }  # fmt: skip


def save(engine: Any, run: Run, inputs: Inputs, progress: Progress, world: runtime.World) -> None:
    def save_shards(folder: Path) -> None:
        engine.save_checkpoint(str(folder), tag="engine", save_latest=False)

    remembered = memory(run, inputs, progress, world, engine.zero_optimization_stage())
    weights = store.gather_weights(engine)
    path = store.save(run.run_dir, progress.step, remembered, weights, save_shards, run.checkpoint.keep_last)
    log.info("saved %s", path)


def restore(engine: Any, run: Run, inputs: Inputs, world: runtime.World) -> Progress:
    """Load the newest checkpoint of the run directory into the engine, or start from nothing.

    Raises:
        CheckpointError: it is damaged, or was trained differently.
    """
    found = store.newest(run.run_dir) if run.resume == "auto" else None
    if run.resume == "never" and store.newest(run.run_dir):
        raise CheckpointError(f"{run.run_dir} holds checkpoints and resume is 'never': choose another run_dir or remove it.")
    if found is None:
        return Progress()
    remembered = store.manifest(found)
    resume.compare(found, remembered, memory(run, inputs, Progress(), world, engine.zero_optimization_stage()))
    path, _ = engine.load_checkpoint(str(found / "deepspeed"), tag="engine")
    loaded = torch.tensor(0.0 if path is None else 1.0, device=world.device)
    dist.all_reduce(loaded, op=dist.ReduceOp.MIN)
    if not loaded:
        raise CheckpointError(f"{found}: DeepSpeed could not load it on every rank. Remove it to resume from an older one.")
    log.info("resumed from %s", found)
    return Progress(**{name: remembered[name] for name in asdict(Progress())})


def describe(run: Run, inputs: Inputs, world: runtime.World, engine: Any, samples: int) -> None:
    """Print the resolved configuration once, and keep it with the run."""
    if not world.is_main:
        return
    run.run_dir.mkdir(parents=True, exist_ok=True)
    (run.run_dir / "config.yaml").write_text(dump(run))
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    log.info("%s", dump(run))
    log.info(
        "%d rank(s) by %s on %s, ZeRO %d, %s; %s parameters; %d training samples, %.2f epochs; "
        "batch %d = %d micro x %d accumulated x %d ranks; elevation bias by %s",
        world.size, world.launcher, world.device.type, engine.zero_optimization_stage(), run.precision, f"{parameters:,}",
        samples, run.steps * run.batch.total / samples, run.batch.total, run.batch.micro,
        run.batch.accumulation(world.size), world.size, kernel_name(world.device),
    )  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="trainer/train.py", description="Train TopoFlow under DeepSpeed. Started again, it continues.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  deepspeed --num_gpus 2 trainer/train.py --config launch/configs/demo.yaml\n"
        "  deepspeed --num_gpus 8 trainer/train.py --config launch/configs/china_128x256.yaml \\\n"
        "      --deepspeed_config ds_configs/zero1.json batch.total=64 run_dir=runs/mine",
    )  # fmt: skip
    parser.add_argument("--config", required=True, type=Path, help="YAML of the run, see launch/configs/")
    default = Path(__file__).parents[1] / "ds_configs" / "zero1.json"
    parser.add_argument(
        "--deepspeed_config", type=Path, default=default, help="DeepSpeed's JSON (default ds_configs/zero1.json)"
    )
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; the environment is used instead")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of refused runs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change the configuration, as in steps=600")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    main_rank = os.environ.get("RANK", "0") == "0"
    try:
        run = load(options.config, options.overrides)
        world = runtime.join(run.timeout_minutes)
        main_rank = world.is_main
        finished = train(run, options.deepspeed_config, world)
    except (*Refusals, TrainingError) as error:
        if options.debug:
            raise
        if main_rank:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_WRONG
    finally:
        runtime.leave()
    return 0 if finished else EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
