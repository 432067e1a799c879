"""THE loop: `deepspeed --num_gpus 2 trainer/train.py --config launch/configs/demo.yaml`; read it top to bottom."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from data import DataError
from data.batch import Batch, ahead_on_device
from data.stream import Stream, step_start
from trainer import engine as engines
from trainer import gate, runtime
from trainer.checkpoint import consistency, resume, store
from trainer.checkpoint.pretrained import write_report
from trainer.checkpoint.store import CheckpointError
from trainer.config import ConfigError, Run, dump, load
from trainer.config import validate as validate_config
from trainer.engine import learning_rate
from trainer.inputs import Inputs, architecture, open_inputs
from trainer.metrics import normalised_loss, score_evenly, weighted_mse
from trainer.model.attention import kernel_name
from trainer.model.flops import training_flops
from trainer.model.topoflow import TopoFlow
from trainer.progress import Progress, TrainingError, loss_limit, recall, remember_loss, roll_back, step_over_bad_samples
from trainer.telemetry import Telemetry, Window, measure_matrix_rate
from trainer.trained import import_weights
from trainer.watchdog import BACKSTOP_S, Watchdog

log = logging.getLogger("trainer")
EXIT_WRONG = 2  # configuration, data or checkpoint refused
EXIT_STOPPED = 75  # stopped on request after saving; start again to continue
Refusals = (ConfigError, DataError, CheckpointError, runtime.LaunchError)


def train(run: Run, options: argparse.Namespace, world: runtime.World, watchdog: Watchdog) -> bool:
    """Train until `run.steps`; True when finished, False when stopped on request.

    Raises:
        DataError, CheckpointError, ConfigError: refused before step 1.
        TrainingError: too many skipped steps in a row.
    """
    deepspeed_config = engines.resolve_deepspeed(options.deepspeed_config, run, world.size)
    stop = runtime.StopVote(run.run_dir, runtime.end_time(options.time_limit, os.environ))
    inputs = open_inputs(run, world.device)
    lock = runtime.claim(run.run_dir, world)
    samples = inputs.index("train")
    held_out = inputs.stream(inputs.index("validation"))

    torch.manual_seed(run.seed)  # every rank builds the same weights
    model = TopoFlow(architecture(run)).to(world.device)
    found, universal, progress = look_back(
        run, inputs, model, world, deepspeed_config["zero_optimization"]["stage"], options.allow_change
    )
    imported, hashes = load_foreign_weights(model, run, world) if found is None else ({}, {})
    engine = engines.build_engine(model, run, deepspeed_config, universal is not None)
    consistency.set_masters(engine, imported)
    if found is not None:
        resume.load_engine(engine, found, universal)
        engines.restate_hyperparameters(engine, run)
        log.info("resumed from %s", found)
    consistency.require_loaded(engine, hashes)
    describe(run, inputs, world, engine, len(samples))
    if progress.step >= run.steps:
        log.info("already at step %d of %d: nothing to do", progress.step, run.steps)
        return True
    if progress.step == 0:
        watchdog.enter("validation")
        scores = validate(engine, held_out, inputs, progress, world)
        log.info("step 0: validation loss %.4f", scores["loss"])
        gate.require_expected(engine, inputs, scores["loss"], world)

    accumulation = run.batch.accumulation(world.size)
    watchdog.enter("first_batch")
    batches = training_batches(inputs.stream(samples), progress, run, world)
    batches = itertools.chain([next(batches)], batches)
    dist.barrier()  # so that a rank without data is named in this phase, not in the longer one after it
    flops = training_flops(model.arch, run.batch.micro)
    rate = measure_matrix_rate(world.device, engines.dtype_of(run))
    window, stopping = Window(inputs, flops, rate), False
    pending: store.Saving | None = None
    with Telemetry(run, progress.step) if world.is_main else nullcontext() as telemetry:
        if telemetry and progress.step == 0:
            telemetry.record("validation", 0, {"loss": progress.val_loss or 0.0})
        while progress.step < run.steps and not stopping:
            watchdog.enter("step")
            started = time.monotonic()
            stop.cast(busy=pending is not None and pending.writing)
            lr = engines.set_learning_rates(engine, progress.step, run)
            take_step(engine, batches, accumulation, inputs, window, run.seed, loss_limit(run, progress))
            progress.step += 1
            progress.samples_seen = step_start(progress.samples_seen, run.batch.total, progress.stepped_over) + run.batch.total
            stopping, writing = stop.agreed()
            skipped = engines.step_was_skipped(engine)
            if pending is not None and (skipped or not writing):
                commit(pending, run, telemetry)
                pending = None
            if skipped:
                step_over_bad_samples(window, progress, run)
                watchdog.enter("start")  # which reads a checkpoint as a roll-back does
                if window.spiked and roll_back(engine, run, progress, world):
                    batches, window = (
                        training_batches(inputs.stream(samples), progress, run, world),
                        Window(inputs, flops, rate),
                    )
                    if telemetry:
                        telemetry.rewind(progress.step)
                    continue
            else:
                progress.bad_steps = 0
                window.keep_step()
                remember_loss(window.step_loss, progress, run)

            last = progress.step == run.steps
            saving = last or stopping or progress.step % run.checkpoint.every == 0
            if (saving or progress.step % run.telemetry.every == 0) and window.kept:
                metrics = window.summary(engine, lr, run.batch.total)
                if telemetry:
                    telemetry.status(progress.step, metrics)
            stepped = time.monotonic()
            if last or progress.step % run.validation.every == 0:
                watchdog.enter("validation")
                scores = validate(engine, held_out, inputs, progress, world)
                if telemetry:
                    telemetry.record("validation", progress.step, scores)
                    log.info("step %d: validation loss %.4f, best %.4f", progress.step, scores["loss"], progress.best_val_loss)
            progress.wall_seconds += time.monotonic() - started
            if saving:
                watchdog.enter("save")
                if pending is not None:
                    commit(pending, run, telemetry)
                pending = save(engine, run, inputs, progress, world)
            window.paused += time.monotonic() - stepped
        watchdog.enter("save")
        if pending is not None:
            commit(pending, run, telemetry)
    lock.close()
    if stopping and progress.step < run.steps:
        reason = stop.reason or "another rank was told to"
        if options.stopped_file and world.is_main and stop.wants_to_continue:
            options.stopped_file.touch()
        log.info("stopped at step %d (%s); start the same command again to continue", progress.step, reason)
    return progress.step == run.steps


def training_batches(stream: Stream, progress: Progress, run: Run, world: runtime.World) -> Iterator[Batch]:
    """This rank's micro-batches from where the run is, without the samples that it has rolled back over."""
    accumulation = run.batch.accumulation(world.size)
    batches = stream.training(
        progress.samples_seen, run.batch.micro, accumulation, world.size, world.rank, progress.stepped_over
    )
    return ahead_on_device(batches, world.device)


def take_step(
    engine: Any, batches: Iterator[Batch], accumulation: int, inputs: Inputs, window: Window, seed: int, limit: float | None
) -> None:
    """One optimizer step: accumulate the gradients of this rank's micro-batches, clip, update.

    Above `limit`, the step's loss over all ranks is made not finite, so that all skip the update together.
    """
    for number in range(accumulation):
        waiting = time.perf_counter()
        raw = next(batches)
        window.waited += time.perf_counter() - waiting
        batch, example, arguments = inputs.prepare(raw)
        # Dropout depends on the place in the stream alone: a resumed run, on any number of ranks, draws the same.
        torch.manual_seed((seed << 40) + batch.position)
        computing = time.perf_counter()
        forecast = engine(*arguments)
        window.forward += time.perf_counter() - computing  # on a GPU, of launching its work
        losses = weighted_mse(forecast, example.targets, example.weight)
        window.add(losses.detach(), example.weight.mean((0, 2, 3)), example.missing_inputs, batch)
        loss = losses.mean()
        if limit is not None and number == accumulation - 1 and window.is_spike(limit):
            loss = loss * torch.nan
        engine.backward(loss)
        engines.guard_plain_step(engine)
        engine.step()


def validate(engine: Any, held_out: Stream, inputs: Inputs, progress: Progress, world: runtime.World) -> dict[str, float]:
    """Score the fixed validation samples, sharing them over ranks, and remember the loss."""
    engine.eval()
    sums = score_evenly(engine, held_out, inputs, world.size, world.rank)
    engine.train()
    progress.val_loss = normalised_loss(sums, inputs.normalizer)
    progress.val_step = progress.step
    progress.best_val_loss = min(progress.best_val_loss, progress.val_loss)
    table = sums.table()
    scores = {"loss": progress.val_loss}
    for row, name in enumerate(inputs.normalizer.targets):
        for column, lead in enumerate(sums.lead_hours):
            scores |= {f"{kind}_{name}_{lead}h": float(table[kind][row, column]) for kind in ("rmse", "skill")}
    return scores


def memory(
    run: Run, inputs: Inputs, model: torch.nn.Module, progress: Progress, world: runtime.World, zero_stage: int
) -> dict[str, Any]:
    """What the checkpoint's manifest says beside its files."""
    return {
        **asdict(progress), "config": run.model_dump(mode="json"), "fingerprints": inputs.fingerprints(),
        "statistics": inputs.store.statistics, "world_size": world.size, "zero_stage": zero_stage,
        "optimizer_layout": engines.optimizer_layout(model, run), "version": version("topoflow-trainer"),
    }  # fmt: skip


def save(engine: Any, run: Run, inputs: Inputs, progress: Progress, world: runtime.World) -> store.Saving:
    """Copy what a checkpoint holds and start writing it; training goes on meanwhile."""
    started = time.monotonic()
    remembered = memory(run, inputs, engine.module, progress, world, engine.zero_optimization_stage())
    pending = resume.save_engine(engine, run.run_dir, progress.step, remembered)
    pending.stall = time.monotonic() - started
    return pending


def commit(pending: store.Saving, run: Run, telemetry: Telemetry | None) -> None:
    """Make a checkpoint visible once all ranks have written it, and remove old ones."""
    started = time.monotonic()
    path = pending.commit()
    if telemetry:
        store.retain(run.run_dir, run.checkpoint.keep_last, run.checkpoint.keep_every)
        seconds = pending.stall + time.monotonic() - started
        telemetry.record("checkpoint", pending.memory["step"], {"stall_s": seconds, "write_s": pending.write_seconds})
        log.info("saved %s: training waited %.2f s, written in %.2f s", path, seconds, pending.write_seconds)


def look_back(
    run: Run, inputs: Inputs, model: TopoFlow, world: runtime.World, zero_stage: int, allow_change: list[str]
) -> tuple[Path | None, Path | None, Progress]:
    """The newest valid checkpoint of the run directory, its universal form if this world needs one, and its progress.

    Raises:
        CheckpointError: there are checkpoints but none is valid, or the run would not be the same run.
    """
    found = store.newest_valid(run.run_dir)
    if found is None:
        return None, None, Progress()
    if run.resume == "never":
        raise CheckpointError(f"{run.run_dir} holds checkpoints and resume is 'never': choose another run_dir.")
    remembered = store.manifest(found)
    changes = resume.compare(found, remembered, memory(run, inputs, model, Progress(), world, zero_stage), allow_change)
    universal = resume.make_loadable(found, remembered, world.size, zero_stage)
    progress = recall(remembered)
    before = validate_config(remembered["config"], str(found / "manifest.json"))
    rates = [learning_rate(r.optimizer.lr, progress.step, r.steps, r.schedule) for r in (before, run)]
    if rates[0] != rates[1]:
        log.info(
            "WARNING: the learning rate continues at %.3g, not %.3g: the schedule's length or form has changed", *rates[::-1]
        )
        changes.append({"name": "learning rate at resume", "before": rates[0], "after": rates[1]})
    progress.changes += [{"step": progress.step, **change} for change in changes]
    return found, universal, progress


def load_foreign_weights(model: TopoFlow, run: Run, world: runtime.World) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Fill `model` from `init_from`: rank 0 reads the file once, the others receive it in buckets; collective.

    Returns:
        What the fp32 masters must hold where DeepSpeed would make them from rounded weights (bf16), and the hash of every
        tensor that was loaded; both by name, empty without `init_from`.

    Raises:
        CheckpointError: on every rank, if the weights do not load completely.
    """
    if run.init_from is None:
        return {}, {}
    refusal: list[str | None] = [None]
    if world.is_main:
        try:
            tensors, report = import_weights(model, run.init_from.path, run.init_from.allow_missing)
            run.run_dir.mkdir(parents=True, exist_ok=True)
            write_report(report, run.run_dir / "import.json")
            report.show(Console(stderr=True))
            report.refuse_unless_complete()
            model.load_state_dict({**model.state_dict(), **tensors})
        except CheckpointError as error:
            refusal = [str(error)]
    dist.broadcast_object_list(refusal, src=0)
    if refusal[0] is not None:
        raise CheckpointError(refusal[0])
    consistency.broadcast_from_main(model.parameters())
    rounded = run.precision == "bf16"
    values = {name: p.detach().clone() for name, p in model.named_parameters() if rounded}
    return values, consistency.hash_tensors(model.named_parameters())


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
        run.batch.accumulation(world.size), world.size,
        kernel_name(world.device.type, engines.dtype_of(run), run.model.width // run.model.heads),
    )  # fmt: skip
    log.info(
        "learning rate: %.3g after %d warm-up steps, cosine to %.3g at step %d, run ends at step %d",
        run.optimizer.lr, run.schedule.warmup_steps, run.optimizer.lr * run.schedule.final_lr,
        run.schedule.decay_steps or run.steps, run.steps,
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
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY",
                        help="accept that a resumed run differs in this key from its checkpoint; repeatable")  # fmt: skip
    parser.add_argument("--time-limit", type=float, metavar="MINUTES",
                        help="save and exit with code 75 after this long (under SLURM also before the job's end)")  # fmt: skip
    parser.add_argument("--world-size", type=int, metavar="N", help="refuse to start with another number of ranks")
    parser.add_argument("--stopped-file", type=Path, metavar="FILE",
                        help="create this and exit with 0 after a stop at the time limit or by SIGUSR1")  # fmt: skip
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; the environment is used instead")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of refused runs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change the configuration, as in steps=600")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    rank = 0
    try:
        rank, _, size, _ = runtime.find_ranks(os.environ)
        runtime.quieten(rank)
        runtime.require_size(size, options.world_size)
        run = load(options.config, options.overrides)
        runtime.keep_errors(run.run_dir, rank)
        with Watchdog(run.run_dir, rank, size, run.watch) as watchdog:
            watchdog.enter("rendezvous")
            # Longer than any deadline: the watchdog's report names the silent ranks, a broken collective does not.
            world = runtime.join((max(run.watch.model_dump().values()) + BACKSTOP_S) / 60)
            watchdog.enter("first_collective")
            runtime.try_collectives(world)
            watchdog.enter("start")
            finished = train(run, options, world, watchdog)
            watchdog.enter("first_collective")
            runtime.leave()
    except (*Refusals, TrainingError) as error:
        if options.debug:
            raise
        # Another rank may be the only one that failed; where all did, rank 0 tells the whole story.
        log.error("error: %s", error if rank == 0 else str(error).splitlines()[0])
        return EXIT_WRONG
    finally:
        runtime.leave()
    # A scheduler that watches the file kills the others when the first rank fails: stopping is no failure to it.
    return 0 if finished or options.stopped_file else EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
