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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.batch import Batch, ahead_on_device
from data.locks import Held
from data.stream import Stream, step_start
from trainer import engine as engines
from trainer import gate, runtime, start, stopping
from trainer.checkpoint.consistency import on_main
from trainer.checkpoint.manifest import Progress
from trainer.command import REFUSALS
from trainer.config import ConfigError, Run, dump, load
from trainer.failing import Failing, quieten
from trainer.inputs import Inputs, architecture, open_inputs
from trainer.metrics import normalised_loss, score_evenly, weighted_mse
from trainer.model.attention import kernel_name
from trainer.model.flops import training_flops
from trainer.model.topoflow import TopoFlow
from trainer.progress import loss_limit, remember_loss, roll_back, step_over_bad_samples
from trainer.saver import Saver
from trainer.telemetry import Telemetry, Window, measure_matrix_rate, require_wandb
from trainer.watchdog import BACKSTOP_S, Watchdog

log = logging.getLogger("trainer")
EXIT_STOPPED = 75  # stopped on request after saving; start again to continue


def train(run: Run, options: argparse.Namespace, world: runtime.World, watchdog: Watchdog) -> bool:
    """Train until `run.steps`; True when finished, False when stopped on request.

    Raises:
        DataError, CheckpointError, ConfigError, LaunchError: refused before step 1.
        TrainingError: too many skipped steps in a row, or too many roll-backs.
    """
    deepspeed_config = engines.resolve_deepspeed(options.deepspeed_config, run, world.size)
    stop = stopping.StopVote(run.run_dir, stopping.end_time(options.time_limit, os.environ))
    runtime.require_shared(run.run_dir, world)
    lock = runtime.claim(run.run_dir, world)
    inputs = open_inputs(run, world.device)
    samples = inputs.index("train")
    held_out = inputs.stream(inputs.index("validation"))

    torch.manual_seed(run.seed)  # every rank builds the same weights
    model = TopoFlow(architecture(run)).to(world.device)
    begun = start.begin(run, inputs, model, deepspeed_config, options.allow_change)
    engine = engines.build_engine(model, run, deepspeed_config)
    start.load(engine, begun)
    progress = begun.progress
    describe(run, inputs, world, engine, len(samples), options.config, begun)
    if progress.step >= run.steps:
        log.info("already at step %d of %d: nothing to do", progress.step, run.steps)
        end(stop, lock, options)
        return True
    progress.set_validated_on(inputs.validation_set())
    if progress.step == 0:
        watchdog.enter("validation")
        scores = validate(engine, held_out, inputs, progress, world, stop)
        if scores is None:
            log.info("stopped before step 1 (%s): nothing was to be saved", stop.reason or "another rank was told to")
            end(stop, lock, options, stopped=True)
            return False
        log.info("step 0: validation loss %.4f", scores["loss"])
        gate.require_expected(engine, inputs, scores["loss"], world)

    accumulation = run.batch.accumulation(world.size)
    watchdog.enter("first_batch")
    batches = training_batches(inputs.stream(samples), progress, run, world)
    batches = itertools.chain([next(batches)], batches)
    dist.barrier()  # so that a rank without data is named in this phase, not in the longer one after it
    flops = training_flops(model.arch, run.batch.micro)
    rate = measure_matrix_rate(world.device, engines.dtype_of(run))
    window, stopping_now = Window(inputs, flops, rate), False
    telemetry = open_telemetry(run, progress.step, world)

    def remember() -> Any:
        return start.remember(run, inputs, engine.module, progress, deepspeed_config, world.size)

    saver = Saver(engine, run, remember, telemetry)
    with telemetry or nullcontext():
        if telemetry and progress.step == 0:
            telemetry.record("validation", 0, {"loss": progress.val_loss or 0.0})
        while progress.step < run.steps and not stopping_now:
            watchdog.enter("step")
            started = time.monotonic()
            stop.cast(busy=saver.writing)
            lr = engines.set_learning_rates(engine, progress.step, run)
            take_step(engine, batches, accumulation, inputs, window, run.seed, loss_limit(run, progress))
            progress.step += 1
            progress.samples_seen = step_start(progress.samples_seen, run.batch.total, progress.stepped_over) + run.batch.total
            stopping_now, writing = stop.agreed()
            skipped = engines.step_was_skipped(engine)
            if skipped or not writing:
                watchdog.enter("save")  # a skipped step waits for the writers
                saver.commit()
            if skipped:
                step_over_bad_samples(window, progress, run)
                watchdog.enter("start")  # which reads a checkpoint as a roll-back does
                if window.spiked and roll_back(engine, run, progress):
                    batches = training_batches(inputs.stream(samples), progress, run, world)
                    window = Window(inputs, flops, rate)
                    if telemetry:
                        telemetry.rewind(progress.step)
                    saver.save()  # what was stepped over is remembered, whatever comes next
                    continue
            else:
                progress.bad_steps = 0
                window.keep_step()
                remember_loss(window.step_loss, progress, run)

            last = progress.step == run.steps
            if (last or stopping_now or is_due(progress.step, run)) and window.kept:
                metrics = window.summary(engine, lr, run.batch.total)
                if telemetry:
                    telemetry.status(progress.step, metrics)
            stepped = time.monotonic()
            if last or (progress.step % run.validation.every == 0 and not stopping_now):
                watchdog.enter("validation")
                scores = validate(engine, held_out, inputs, progress, world, None if last else stop)
                stopping_now = stopping_now or scores is None
                if telemetry and scores is not None:
                    telemetry.record("validation", progress.step, scores)
                    log.info("step %d: validation loss %.4f, best %.4f", progress.step, scores["loss"], progress.best_val_loss)
            progress.wall_seconds += time.monotonic() - started
            if last or stopping_now or progress.step % run.checkpoint.every == 0:
                watchdog.enter("save")
                saver.save()
            window.paused += time.monotonic() - stepped
        watchdog.enter("save")
        saver.commit()
    stopped = stopping_now and progress.step < run.steps
    end(stop, lock, options, stopped)
    if stopped:
        reason = stop.reason or "another rank was told to"
        log.info("stopped at step %d (%s); start the same command again to continue", progress.step, reason)
    return progress.step == run.steps


def end(stop: stopping.StopVote, lock: Held | None, options: argparse.Namespace, stopped: bool = False) -> None:
    """Everything is saved: hear no more signals; rank 0 lets go of the run directory and tells the scheduler's script."""
    stop.finish()
    if lock is not None:
        lock.close()
        if stopped and options.stopped_file and stop.wants_to_continue:
            options.stopped_file.touch()


def is_due(step: int, run: Run) -> bool:
    """Whether a status line belongs to this step."""
    return step % run.telemetry.every == 0 or step % run.checkpoint.every == 0


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


def validate(
    engine: Any, held_out: Stream, inputs: Inputs, progress: Progress, world: runtime.World, stop: stopping.StopVote | None
) -> dict[str, float] | None:
    """Score the fixed validation samples, sharing them over ranks, and remember the loss; None if told to `stop` meanwhile.

    The last one of a run is not left: there is nothing to continue with afterwards.
    """
    interrupted = stop.agree_now if stop else lambda: False
    engine.eval()
    sums = score_evenly(engine, held_out, inputs, world.size, world.rank, interrupted)
    engine.train()
    if interrupted():
        return None
    progress.val_loss = normalised_loss(sums, inputs.normalizer)
    progress.val_step = progress.step
    progress.best_val_loss = min(progress.best_val_loss, progress.val_loss)
    table = sums.table()
    scores = {"loss": progress.val_loss}
    for row, name in enumerate(inputs.normalizer.targets):
        for column, lead in enumerate(sums.lead_hours):
            scores |= {f"{kind}_{name}_{lead}h": float(table[kind][row, column]) for kind in ("rmse", "skill")}
    return scores


def open_telemetry(run: Run, first_step: int, world: runtime.World) -> Telemetry | None:
    """On rank 0; the others learn if it cannot be opened; collective."""
    opened: list[Telemetry] = []
    on_main(lambda: opened.append(Telemetry(run, first_step)), REFUSALS)
    return opened[0] if opened else None


def describe(
    run: Run, inputs: Inputs, world: runtime.World, engine: Any, samples: int, config: Path, begun: start.Start
) -> None:
    """Print the resolved configuration once, and keep it with the run."""
    kernel = agreed_kernel(run, world)
    on_main(lambda: (run.run_dir / "config.yaml").write_text(dump(run)))
    if begun.checkpoint is not None:
        log.info("resumed from %s", begun.checkpoint)
    elif world.is_main:
        log.info("no checkpoint in %s: starting at step 0", run.run_dir)
        other = start.of_another_directory(run.run_dir, config)
        if other is not None:
            log.info("WARNING: %s holds checkpoints of a run of the same name. To continue that one, stop this and start "
                     "from the directory that it was started from, or set run_dir=%s", other, other)  # fmt: skip
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    log.info("%s", dump(run))
    log.info(
        "%d rank(s) by %s on %s, ZeRO %d, %s; %s parameters; %d training samples, %.2f epochs; "
        "batch %d = %d micro x %d accumulated x %d ranks; elevation bias by %s",
        world.size, world.launcher, world.device.type, engine.zero_optimization_stage(), run.precision, f"{parameters:,}",
        samples, run.steps * run.batch.total / samples, run.batch.total, run.batch.micro,
        run.batch.accumulation(world.size), world.size,
        kernel,
    )  # fmt: skip
    log.info(
        "learning rate: %.3g after %d warm-up steps, cosine to %.3g at step %d, run ends at step %d",
        run.optimizer.lr, run.schedule.warmup_steps, run.optimizer.lr * run.schedule.final_lr,
        run.schedule.decay_steps or run.steps, run.steps,
    )  # fmt: skip


def agreed_kernel(run: Run, world: runtime.World) -> str:
    """How the elevation bias is computed, alike on all ranks; collective.

    Raises:
        ConfigError: on every rank, if one would take a slower way than the others, which all would wait for.
    """
    if not run.model.elevation_bias:
        return "nothing (off)"
    mine = kernel_name(world.device.type, engines.dtype_of(run), run.model.width // run.model.heads)
    everyone = [""] * world.size
    dist.all_gather_object(everyone, mine)
    if len(set(everyone)) > 1:
        odd = {kernel: [rank for rank, k in enumerate(everyone) if k == kernel] for kernel in sorted(set(everyone))}
        listed = "; ".join(f"{kernel} on rank(s) {ranks[:8]}" for kernel, ranks in odd.items())
        raise ConfigError(f"the elevation bias would be computed in different ways: {listed}. Give all ranks the same kind of "
                          "GPU and the same torch; the logs of the slower ones in RUN/errors say why.")  # fmt: skip
    return mine


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
    return parser.parse_intermixed_args(argv)


def prepare(options: argparse.Namespace, size: int) -> Run:
    """Everything that can be refused before the ranks meet.

    Raises:
        ConfigError, LaunchError: the configuration, DeepSpeed's settings or the number of ranks are wrong.
    """
    runtime.require_size(size, options.world_size)
    run = load(options.config, options.overrides)
    engines.resolve_deepspeed(options.deepspeed_config, run, size)
    require_wandb(run)
    return run


def main(argv: list[str]) -> int:
    options = parse(argv)
    rank = int(os.environ["RANK"]) if os.environ.get("RANK", "").isdecimal() else 0
    failing = Failing(rank, options.debug)
    try:
        rank, _, size, _ = runtime.find_ranks(os.environ)
        failing.rank = rank
        quieten(rank)
        run = prepare(options, size)
        failing.keep_in(run.run_dir)
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
    except REFUSALS as error:
        failing.refuse(error)
    # A scheduler that watches the file kills the others when the first rank fails: stopping is no failure to it.
    return 0 if finished or options.stopped_file else EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
