"""Checks of data and network: one step, its loss, its sensitivity, a checkpoint."""

from __future__ import annotations

import shutil
import time
from typing import Any

import numpy as np
import torch

from data.store.layout import hash_of, shard_file
from trainer.checkpoint import loading, saving, state
from trainer.checkpoint.manifest import CheckpointError, Progress
from trainer.dataset import open_dataset
from trainer.engine import build_engine, freeze, resolve_deepspeed, set_learning_rates
from trainer.model.topoflow import START_AT_ZERO, TopoFlow
from trainer.preflight.report import Failed, Subject
from trainer.run import start
from trainer.scores.errors import weighted_loss
from trainer.scores.scoring import validation_loss
from trainer.scores.strength import judged_in
from trainer.weights.fit import network_of
from trainer.weights.reading import wanted

LEAST_BIAS = 1e-3  # of scores: the highest patch would get 0.1 % less weight than the lowest one; below is F03
SAMPLES = 12


def check_data(subject: Subject) -> str:
    dataset = open_dataset(subject.run, subject.world.device)
    index = dataset.index("train")
    counts = {split: len(dataset.index(split)) for split in ("train", "validation")}
    rng = np.random.default_rng(subject.run.seed)
    started = time.monotonic()
    for _ in dataset.stream(index).listed(rng.integers(0, len(index), SAMPLES), 1):
        pass
    rate = SAMPLES / (time.monotonic() - started)
    recorded = dataset.store.shard_hashes()
    chosen = sorted(recorded)[int(rng.integers(len(recorded)))]
    shard = dataset.store.path / shard_file(chosen)
    if hash_of(shard) != recorded[chosen]:
        raise Failed(f"{shard} is not what was written", f"python -m data verify {dataset.store.path}")
    subject.dataset = dataset
    return (
        f"fingerprint {dataset.store.fingerprint[:12]}, {counts['train']} training and {counts['validation']} validation "
        f"samples, {rate:.0f} samples/s here"
    )


def check_statistics(subject: Subject) -> str:
    dataset = subject.dataset
    index = dataset.index("train")
    chosen = np.random.default_rng(0).integers(0, len(index), 4 * SAMPLES)
    batches = dataset.stream(index).listed(chosen, 1)
    fields = torch.cat([dataset.normalizer(batch.to(dataset.device)).inputs for batch in batches])
    strange = []
    for channel, name in enumerate(dataset.normalizer.inputs):
        mean, std = float(fields[:, channel].mean()), float(fields[:, channel].std())
        if abs(mean) > 1.5 or not 0.2 < std < 4.0:
            strange.append(f"{name}: normalised mean {mean:+.2f}, deviation {std:.2f}")
        variable, own = dataset.store.contents.variable(name), dataset.store.statistics[name]["mean"]
        typical = variable.typical
        if typical is not None and not 0.3 * typical[0] <= own <= 3.0 * typical[1]:
            strange.append(f"{name}: mean {own:.4g} {variable.units}, usual {typical[0]:g} .. {typical[1]:g}")
    if strange:
        raise Failed("; ".join(strange), "the statistics are not of this data, or a unit is wrong: prepare the store again")
    return f"{len(dataset.normalizer.inputs)} inputs have about mean 0 and deviation 1"


def check_scan(subject: Subject) -> str:
    if subject.dataset.scan is None:
        return f"mode {subject.dataset.run.wind_scan.mode}, no cache"
    usable = subject.dataset.scan.usable(subject.dataset.run.wind_scan.mode).mean()
    if usable < 0.5:
        raise Failed(f"{100 * usable:.0f} % of the hours have a wind", "look for gaps with `python -m data inspect`")
    return f"orders {subject.dataset.scan.orders_hash[:12]}, {100 * usable:.1f} % of the hours have a wind"


def check_weights(subject: Subject) -> str:
    source = subject.run.init_from
    if source is None:
        torch.manual_seed(subject.run.seed)
        model = TopoFlow(subject.run.architecture())
        found = f"{sum(p.numel() for p in model.parameters()):,} parameters, random"
    else:
        model, report = network_of(wanted(source), subject.run, source)
        found = f"{100 * report.share:.2f} % of the parameters from {source.path}"
    freeze(model, subject.run)
    subject.model = model.to(subject.world.device)
    return found


def check_initialisation(subject: Subject) -> str:
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
    device = subject.world.device
    own = state.Named({name: tensor.detach().float().cpu().clone() for name, tensor in subject.model.state_dict().items()})
    engine = build_engine(subject.model, subject.run, subject.deepspeed)
    start.load(engine, start.Start(Progress(), named=own))
    _, example, arguments = next(prepared(subject))
    started = time.monotonic()
    loss = weighted_loss(engine(*arguments), example.targets, example.weight, subject.run.loss.kind).mean()
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
    index = subject.dataset.index("validation")
    stream = subject.dataset.stream(index)
    return (subject.dataset.prepare(batch) for batch in stream.listed(index.evenly(1)[:1], 1))


def check_first_loss(subject: Subject) -> str:
    expect = subject.run.expect
    if expect is None:
        return "no `expect` in the configuration"
    loss = validation_loss(subject.model.eval(), subject.dataset)
    subject.model.train()
    if abs(loss - expect.val_loss) > expect.tolerance:
        raise Failed(
            f"validation loss {loss:.4f}, expected {expect.val_loss} +- {expect.tolerance}",
            "the job would be refused: start it on one rank to see which cause fits",
        )
    return f"validation loss {loss:.4f}, expected {expect.val_loss} +- {expect.tolerance}"


def check_sensitivity(subject: Subject) -> str:
    """Toggling each physics feature must change the output; legacy scans carry theirs inside the model's arguments."""
    if subject.run.wind_scan.of_old_code:
        return f"not examined in mode {subject.run.wind_scan.mode}"
    model = subject.model.eval()
    _, _, (x, lead, elevation, rank, *more) = next(prepared(subject))
    with torch.no_grad():
        plain = model(x, lead, elevation, rank, *more)
        changes = {}
        if subject.run.wind_scan.mode != "none":
            tokens = rank.shape[1]
            changes["wind scan"] = model(x, lead, elevation, tokens - 1 - rank, *more)
        if subject.run.model.elevation_bias != "none":
            changes["elevation bias"] = model(x, lead, torch.zeros_like(elevation), rank, *more)
        if model.sources is not None:  # whose maps are zero at the start
            other = {"sources.source_maps": model.sources.source_maps + 1.0}
            changes["sources"] = torch.func.functional_call(model, other, (x, lead, elevation, rank, *more))
    model.train()
    scale = float(plain.std())
    shares = {name: float((other - plain).abs().max()) / scale for name, other in changes.items()}
    dead = [name for name, share in shares.items() if share == 0.0]
    said = ", ".join(f"{name} changes the output by up to {share:.2g} deviations" for name, share in shares.items())
    if subject.run.model.elevation_bias != "none":
        alpha = next(float(p.detach()) for name, p in model.named_parameters() if name.endswith("elevation_alpha"))
        low = -alpha * float(elevation.max() - elevation.min()) / 1000.0
        said += f"; the bias spans {min(low, 0.0):.3g} .. {max(low, 0.0):.3g}"
        if abs(low) < LEAST_BIAS and "elevation bias" not in dead:
            dead.append(f"elevation bias (it spans {abs(low):.2g}, less than {LEAST_BIAS})")
    if dead:
        raise Failed(
            f"{' and '.join(dead)} changes nothing",
            "the feature cannot act: look at alpha_init, the elevation and the wind-scan cache before spending GPU-hours on it",
        )
    return f"{said}; what it was worth in trainings: docs/study.md" if said else "no physics feature is on"


def check_checkpoint(subject: Subject) -> str:
    """Write a checkpoint as the run would, read it back, load it, and compare."""
    folder = subject.run.run_dir / "preflight"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        started = time.monotonic()
        present = start.describe(subject.run, subject.dataset, subject.engine.module, subject.deepspeed, 1)
        path = saving.Saving(folder, present, state.capture(subject.engine)).commit()
        written = time.monotonic() - started
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        try:
            read = loading.load(path)
        except CheckpointError as error:
            told = f"what was read is not what was written: {error}"
            raise Failed(told, "do not train on this file system") from error
        start.load(subject.engine, start.Start(Progress(), path, read.named))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return f"{size / 1e6:.0f} MB written, read and compared; written in {written:.1f} s"


def check_resume(subject: Subject) -> str:
    """What the job would refuse of the checkpoints in its run directory, it refuses here."""
    options = subject.options
    deepspeed = resolve_deepspeed(options.deepspeed_config, subject.asked, options.world_size)
    present = start.describe(subject.asked, subject.dataset, subject.model, deepspeed, options.world_size)
    same_data = subject.dataset.store.continues
    found, progress = start.look_back(subject.asked, present, options.allow_change, same_data)
    if found is not None:
        warning = judged_in(subject.asked.run_dir)
        told = f"continues from {found.path} at step {progress.step} of {subject.asked.steps}"
        return f"{told}. {warning}" if warning else told
    other = start.of_another_directory(subject.asked.run_dir, options.config)
    if other is not None:
        raise Failed(
            f"{subject.asked.run_dir} holds no checkpoint, but {other} does",
            f"start from the directory that the run was started from, or set run_dir={other}",
        )
    return f"no checkpoint in {subject.asked.run_dir}: starts at step 0"
