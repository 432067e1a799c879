"""One self-contained HTML page of a run: no script, no file beside it, readable on a phone."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 82rem; padding: 1rem; color: #1a2530; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ccd; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.cards div { flex: 1 1 9rem; background: #f2f5f8; border-radius: .5rem; padding: .6rem .8rem; }
.cards b { display: block; font-size: 1.4rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .55rem; text-align: right; border-bottom: 1px solid #e4e8ec; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 7rem; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; } tr.first td { border-top: 2px solid #9ab; }
.better { color: #0a6b2d; font-weight: 600; } .worse { color: #b3261e; font-weight: 600; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } figcaption { font-size: .85rem; color: #456; }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: .8rem; }
.warning { background: #fff3cd; padding: .6rem; }
details summary { cursor: pointer; margin: .5rem 0; }
"""
BASELINES = ("persistence", "climatology", "mix", "against")


def page(
    name: str, evaluation: dict[str, Any], config: str, pictures: list[tuple[str, Path, str]], training: dict[str, Any]
) -> str:
    """
    Args:
        config: YAML of the run.
        pictures: title, PNG file and caption of each.
        training: what is said of the training, by its name.
    """
    split = evaluation["split"]
    weather = escape(evaluation["weather"])
    warning = f'<p class="warning">The weather given to the forecasts was {weather}.</p>' if "perfect" in weather else ""
    first, last = evaluation["period"]
    sections = [
        f"<h1>{escape(name)}</h1>",
        f"<p>Step {evaluation['step']}, {escape(split)} split, {evaluation['samples']} forecasts from {first} to {last}, UTC."
        f" Local days: UTC{evaluation['utc_offset']:+d}.</p>",
        warning,
        _cards(evaluation),
        "<h2>Scores</h2>",
        f"<p>Hourly values of the domain, ug m-3. Skill is 1 - MSE / MSE of the baseline; coloured where its interval "
        f"({escape(evaluation['interval'])}) excludes 0. {escape(evaluation['baseline'])}.</p>",
        f"<p>against: {escape(evaluation['against'])}</p>" if "against" in evaluation else "",
        _scores(evaluation),
        "<h2>Regions</h2>",
        _regions(evaluation),
        *_stations(evaluation),
        "<h2>Local days</h2>",
        _days(evaluation["daily"]),
        *(_picture(*picture) for picture in pictures),
        "<h2>Training and data</h2>",
        _pairs(training | {f"fingerprint of {k}": v for k, v in evaluation["fingerprints"].items()}),
        f"<details><summary>configuration</summary><pre>{escape(config)}</pre></details>",
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(section for section in sections if section)
    head = f"<head>{head}<title>{escape(name)}</title><style>{STYLE}</style></head>"
    return f'<!doctype html>\n<html lang="en">{head}\n<body>\n{body}\n</body></html>\n'


def _compared(evaluation: dict[str, Any]) -> dict[str, str]:
    """Baseline -> the name of the skill against it, of those that were scored."""
    one = next(s for leads in evaluation["scores"].values() for s in leads.values())
    skills = {name: "skill" if name == "persistence" else f"{name}_skill" for name in BASELINES}
    return {name: kind for name, kind in skills.items() if kind in one}


def _cards(evaluation: dict[str, Any]) -> str:
    cells = [s for leads in evaluation["scores"].values() for s in leads.values()]
    cards = []
    for baseline, kind in _compared(evaluation).items():
        known = [s for s in cells if s[kind] is not None]
        if known:
            mean = sum(s[kind] for s in known) / len(known)
            better = sum((s[f"{kind}_low"] or 0) > 0 for s in known)
            worse = sum((s[f"{kind}_high"] or 0) < 0 for s in known)
            counts = f"better in {better}, worse in {worse} of {len(known)}"
            cards.append(f"<div>mean skill against {baseline}<b>{mean:+.3f}</b>{counts}</div>")
    return f'<div class="cards">{"".join(cards)}</div>'


def _scores(evaluation: dict[str, Any]) -> str:
    scores = evaluation["scores"]
    columns = ["RMSE", "MAE", "bias", "NMB %", "R", "IOA", "ACC", "FAC2"]
    columns += [column for baseline in _compared(evaluation) for column in (baseline, "skill")]
    rows = []
    for name, leads in scores.items():
        for number, (lead, s) in enumerate(leads.items()):
            cells = [_text(s[kind]) for kind in ("rmse", "mae", "bias")]
            cells += [_text(None if s["nmb"] is None else 100 * s["nmb"], 1)]
            cells += [_text(s[kind]) for kind in ("r", "ioa", "acc", "fac2")]
            cells = [f"<td>{cell}</td>" for cell in cells]
            for baseline, kind in _compared(evaluation).items():
                cells += [f"<td>{_text(s[f'{baseline}_rmse'])}</td>", _skill(s, kind)]
            rows.append((number == 0, [f"{escape(name)} {escape(lead)}"], cells))
    return _table(("", *columns), rows)


def _skill(s: dict[str, Any], kind: str) -> str:
    if s[kind] is None:
        return "<td>-</td>"
    if s[f"{kind}_low"] is None:
        return f"<td>{s[kind]:+.2f}</td>"
    style = "better" if s[f"{kind}_low"] > 0 else "worse" if s[f"{kind}_high"] < 0 else "even"
    between = f"{s[f'{kind}_low']:+.2f} to {s[f'{kind}_high']:+.2f}"
    return f'<td class="{style}" title="{between}">{s[kind]:+.2f}<small> ({between})</small></td>'


def _regions(evaluation: dict[str, Any]) -> str:
    regions = evaluation["regions"]
    columns = [f"{escape(region)} ({of['cells']} cells) {what}" for region, of in regions.items() for what in ("RMSE", "skill")]
    rows = []
    for name, leads in evaluation["scores"].items():
        for number, lead in enumerate(leads):
            cells = []
            for of in regions.values():
                s = of["scores"][name][lead]
                cells += [f"<td>{_text(s['rmse'])}</td>", _skill(s, "skill")]
            rows.append((number == 0, [f"{escape(name)} {escape(lead)}"], cells))
    return _table(("", *columns), rows) if regions else "<p>None.</p>"


def _stations(evaluation: dict[str, Any]) -> list[str]:
    if "stations" not in evaluation:
        return []
    stations, rows = evaluation["stations"], []
    for name, leads in stations["scores"].items():
        for number, (lead, s) in enumerate(leads.items()):
            cells = [f"<td>{_text(s[kind])}</td>" for kind in ("rmse", "bias", "r", "reanalysis_rmse", "persistence_rmse")]
            rows.append((number == 0, [f"{escape(name)} {escape(lead)}"], [*cells, _skill(s, "skill")]))
    counted = ", ".join(f"{count} {escape(what)}" for what, count in stations["counted"].items())
    columns = ("", "RMSE", "bias", "R", "RMSE of the reanalysis", "of persistence", "skill")
    said = "Errors against the reanalysis that are smaller than its own against the stations mean little."
    return ["<h2>At stations</h2>", f"<p>Observations: {counted}. {said}</p>", _table(columns, rows)]


def _days(daily: dict[str, Any]) -> str:
    if not daily["days"]:
        return "<p>None: they need every hour of a day as an analysis. Evaluate without --samples.</p>"
    columns = ("", "observed %", "POD", "FAR", "CSI", "ETS", "frequency bias", "CSI of persistence")
    rows = []
    for event in daily["events"]:
        for number, (lead, of) in enumerate(event["regions"]["domain"].items()):
            s = of["forecast"]
            if not s["base_rate"]:
                continue
            numbers = [_text(100 * s["base_rate"], 1), *(_text(s[k]) for k in ("pod", "far", "csi", "ets", "frequency_bias"))]
            cells = [f"<td>{cell}</td>" for cell in (*numbers, _text(of["persistence"]["csi"]))]
            what = f"{event['pollutant']} > {event['limit']:g} ({event['averaging']}), {event['standard']}"
            rows.append((number == 0, [f"{escape(what)}, {escape(lead)}"], cells))
    text = f"<p>{daily['days']} days. Limits that were never exceeded are left out.</p>{_table(columns, rows)}"
    headings = ("", "class right %", "of persistence", "within one class %", "primary pollutant right %", "bias", "mean error")
    rows = []
    for index in daily["indices"]:
        for number, (lead, of) in enumerate(index["regions"]["domain"].items()):
            ours, unchanged = of["forecast"], of["persistence"]
            shares = (ours["class_right"], unchanged["class_right"], ours["class_within_one"], ours["primary_right"])
            cells = [_text(None if x is None else 100 * x, 1) for x in shares] + [_text(ours["bias"], 1), _text(ours["mae"], 1)]
            what = f"{index['standard']} of {', '.join(index['pollutants'])}, {lead}"
            rows.append((number == 0, [escape(what)], [f"<td>{cell}</td>" for cell in cells]))
    return f"{text}<p>Air-quality index of local days:</p>{_table(headings, rows)}"


def _picture(title: str, path: Path, caption: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{escape(title)}" src="data:image/png;base64,{content}">'
    return f"<h2>{escape(title)}</h2><figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _pairs(pairs: dict[str, Any]) -> str:
    return _table(("", ""), [(False, [escape(key)], [f"<td>{escape(str(value))}</td>"]) for key, value in pairs.items()])


def _table(columns: tuple[str, ...], rows: list[tuple[bool, list[str], list[str]]]) -> str:
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "\n".join(
        f'<tr class="{"first" if first else "more"}">{"".join(f"<td>{label}</td>" for label in labels)}{"".join(cells)}</tr>'
        for first, labels, cells in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
