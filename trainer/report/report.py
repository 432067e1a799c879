"""All pictures of a run, as files and on one page."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from data import DataError
from trainer.forecaster import Forecaster, given_weather, hour_of
from trainer.report import runs, scores, sources
from trainer.report.page import page
from trainer.scores.comparison import identity_of, other_identity, read_evaluation
from trainer.scores.strength import judged_in

LINES = {
    "skill": (scores.plot_skill, "Skill", "Against each baseline, by lead time; bars are 95 % intervals."),
    "rmse": (scores.plot_errors, "RMSE", "Beside that of the baselines, by lead time."),
    "spectra": (scores.plot_spectra, "Scales", "Variance over that of the truth: below 1, smoothed away."),
    "diurnal": (scores.plot_diurnal, "Hours of the day", "Bias by local hour of the valid time."),
}
OF_DAYS = {
    "events": (scores.plot_events, "Days above limits", "Dashed: frequency bias of 0.5, 1 and 2; curves: equal CSI."),
    "reliability": (scores.plot_reliability, "Reliability of exceedances", "Of the first lead time."),
    "classes": (scores.plot_classes, "Air-quality classes", "Truth down, forecast across, in % of all cells and days."),
}


def write_report(forecaster: Forecaster, split: str) -> Path:
    """Draw everything into RUN/plots, and write RUN/report-SPLIT.html.

    Raises:
        DataError: the run has not been evaluated on this split, or with an older version.
    """
    run_dir = forecaster.run.run_dir
    source = run_dir / f"evaluation-{split}.json"
    if not source.is_file():
        raise DataError(f"{source} is not there. Run `python -m trainer evaluate {run_dir} --split {split}` first.")
    evaluation = read_evaluation(source)
    maps = _maps(source, evaluation)
    scored = [evaluation["step"], evaluation.get("weights")]
    others = other_identity(evaluation, identity_of(forecaster.dataset))
    if others or scored != [forecaster.manifest.step, forecaster.which]:
        raise DataError(
            f"{source} is of step {evaluation['step']}, {evaluation.get('weights')}; {forecaster.checkpoint.name} differs in "
            "step, weights or data: evaluate again."
        )
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    pictures: list[tuple[str, Path, str]] = []

    def picture(name: str, title: str, caption: str) -> Path:
        pictures.append((title, folder / f"{name}-{split}.png", caption))
        return pictures[-1][1]

    for name, (draw, title, caption) in (LINES | (OF_DAYS if evaluation["daily"]["days"] else {})).items():
        draw(evaluation, picture(name, title, caption))
    store = forecaster.dataset.store
    for kind, title in (("rmse", "Maps of RMSE"), ("skill", "Maps of skill against persistence")):
        caption = "Coastlines black, 1,500 and 3,500 m grey lines; grey: not scored."
        scores.plot_maps(evaluation, maps, store, kind, picture(f"map-{kind}", title, caption))
    same_weather = evaluation["weather"] == given_weather(forecaster)  # a case of --future-from is not drawn with another
    for case in evaluation["cases"] if same_weather else []:
        lead, which = case["lead_hours"], case["which"]
        caption = f"The {which} of all {lead} h forecasts by squared error: from {case['analysis']}, UTC."
        title = f"{which.capitalize()} forecast"
        runs.plot_case(forecaster, hour_of(forecaster, case["analysis"]), lead, picture(f"case-{which}", title, caption))
    if forecaster.model.sources is not None:
        learned = "Blue takes away. This is what explains the data along the paths of the air, not an inventory."
        sources.plot_sources(forecaster, picture("sources", "Sources that were learned", learned))
    caption = f"Loss, learning rate and the strength of the elevation bias. {judged_in(run_dir)}"
    runs.plot_curves(run_dir, picture("curves", "Training", caption.strip()))
    out = run_dir / f"report-{split}.html"
    config = (run_dir / "config.yaml").read_text(encoding="utf-8")
    out.write_text(page(run_dir.name, evaluation, config, pictures, _training(forecaster)), encoding="utf-8")
    return out


def _maps(source: Path, evaluation: dict[str, Any]) -> dict[str, np.ndarray]:
    path = source.with_suffix(".npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in ("rmse", "skill")}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): evaluate the run again.") from error


def _training(forecaster: Forecaster) -> dict[str, Any]:
    manifest, progress = forecaster.manifest, forecaster.manifest.progress
    return {
        "checkpoint": forecaster.checkpoint.name,
        "samples seen": progress.samples_seen,
        "ranks, ZeRO stage": f"{manifest.world_size}, {manifest.zero_stage}",
        "best validation loss": f"{progress.best_val_loss:.4f}",
        "hours while it ran": f"{progress.wall_seconds / 3600:.2f}",
        "parameters": f"{sum(p.numel() for p in forecaster.model.parameters()):,}",
        "lead times (h)": ", ".join(map(str, forecaster.run.data.lead_hours)),
        "inputs": ", ".join(forecaster.run.data.channels().names),
        "store": str(forecaster.dataset.store.path),
    }
