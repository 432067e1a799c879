"""One self-contained HTML page of a run, from the template beside this file."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

BASELINES = {"persistence": "skill"}
BASELINES |= {name: f"{name}_skill" for name in ("climatology", "mix", "against")}


def page(
    name: str,
    evaluation: dict[str, Any],
    config: str,
    pictures: list[tuple[str, Path, str]],
    training: dict[str, Any],
) -> str:
    """Fill the page.

    Args:
        config: YAML of the run.
        pictures: title, PNG file and caption of each.
        training: what is said of the training, by its name.
    """
    cells = [s for leads in evaluation["scores"].values() for s in leads.values()]
    skills = {baseline: kind for baseline, kind in BASELINES.items() if kind in cells[0]}
    cards = []
    for baseline, kind in skills.items():
        known = [s for s in cells if s[kind] is not None]
        if not known:
            continue
        better = sum((s[f"{kind}_low"] or 0) > 0 for s in known)
        worse = sum((s[f"{kind}_high"] or 0) < 0 for s in known)
        mean = sum(s[kind] for s in known) / len(known)
        counts = {"better": better, "worse": worse, "count": len(known)}
        cards.append({"baseline": baseline, "mean": mean, **counts})
    encoded = [base64.b64encode(path.read_bytes()).decode() for _, path, _ in pictures]
    images = [(title, data, said) for (title, _, said), data in zip(pictures, encoded, strict=True)]
    loader = FileSystemLoader(Path(__file__).parent)
    templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return templates.get_template("page.html").render(
        name=name, e=evaluation, skills=skills, cards=cards, config=config, pictures=images, training=training
    )
