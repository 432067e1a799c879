"""THE loop: `deepspeed --num_gpus 2 trainer/train.py --config launch/configs/demo.yaml`; read it top to bottom.

Every verb is an object that owns its state: the course knows where the run is and what is due, the learner has the engine
and the micro-batches, the saver the checkpoint that is being written, the stop vote what the ranks agree on.
"""

from __future__ import annotations

import logging
import sys

import torch

from trainer.dataset import Dataset, open_dataset
from trainer.engine import build_engine, freeze, resolve_deepspeed
from trainer.model.topoflow import TopoFlow
from trainer.process.options import parse
from trainer.process.rank import Job, run_rank
from trainer.run import start
from trainer.run.course import Course
from trainer.run.description import announce
from trainer.run.learner import Learner
from trainer.run.saver import Saver
from trainer.run.skipped_steps import step_over
from trainer.run.telemetry import Telemetry
from trainer.run.validation import Validation
from trainer.scores.expected_loss import require_expected

log = logging.getLogger("trainer")


def train(job: Job) -> bool:
    """Train until `run.steps`; False where the ranks agreed to stop before.

    Raises:
        Refusal: before step 1, if anything that the run is made of is wrong; later, if steps or saves keep failing.
    """
    run, world, watchdog, stop = job.run, job.world, job.watchdog, job.stop
    deepspeed = resolve_deepspeed(job.options.deepspeed_config, run, world.size)
    dataset = open_dataset(run, world.device)
    samples, held_out = dataset.index("train"), dataset.index("validation")
    network = new_network(dataset)
    present = start.describe(run, dataset, network, deepspeed, world.size)
    begun = start.begin(dataset, network, present, job.options.allow_change)
    engine = build_engine(network, run, deepspeed)
    start.load(engine, begun)

    course = Course(run, begun.progress)
    announce(dataset, len(samples), world, engine, begun, job.options.config)
    if course.finished:
        log.info("already at step %d of %d: nothing to do", course.step, run.steps)
        return True
    validation = Validation(engine, dataset, course, held_out)
    if course.step == 0 and not starts_as_expected(validation, job):
        return False
    watchdog.enter("first_batch")
    learner = Learner(engine, dataset, course, world, samples)
    with Telemetry(run, course) as telemetry:
        saver = Saver(engine, course, present, telemetry)
        while not (course.finished or stop.agreed):
            watchdog.enter("step")
            stop.cast(saver.writing)
            stepped = learner.step()
            course.count_step()
            stop.count()
            if not (stepped and stop.anyone_writing):  # a skipped step waits for the writers
                watchdog.enter("save")
                saver.commit()
            if stepped:
                course.keep_step(learner.window.keep_step())
            elif step_over(learner, watchdog):
                telemetry.rewind()
                saver.save()
                continue

            if (course.status_is_due or stop.agreed) and learner.window.kept:
                telemetry.status(learner.summary())
            with learner.window.pause():
                if course.finished or (course.validation_is_due and not stop.agreed):
                    watchdog.enter("validation")
                    validation.score_and_log(stop, telemetry)
                if course.save_is_due or stop.agreed:
                    watchdog.enter("save")
                    saver.save()
        watchdog.enter("save")
        saver.commit()
    if not course.finished:
        log.info("stopped at step %d (%s); start the same command again to continue", course.step, stop.why)
    return course.finished


def new_network(dataset: Dataset) -> TopoFlow:
    """The network with the same random weights on every rank; rank 0's start the run where there is no checkpoint."""
    run = dataset.run
    torch.manual_seed(run.seed)
    network = TopoFlow(run.architecture()).to(dataset.device)
    freeze(network, run)
    return network


def starts_as_expected(validation: Validation, job: Job) -> bool:
    """Score the weights that the run begins with; False if it was told to stop meanwhile; collective.

    Raises:
        CheckpointError: the loss is not the one that `expect` states.
    """
    job.watchdog.enter("validation")
    scores = validation.score(job.stop)
    if scores is None:
        log.info("stopped before step 1 (%s): nothing was to be saved", job.stop.why)
        return False
    log.info("step 0: validation loss %.4f", scores["loss"])
    require_expected(validation.engine, validation.dataset, scores["loss"])
    return True


if __name__ == "__main__":
    sys.exit(run_rank(parse(sys.argv[1:]), train))
