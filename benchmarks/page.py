"""A trade-off report as one HTML page: plot, table, F1 per label, steps of the referee, machine.

The page needs no other file, no script and no network, follows the reader's light or dark setting, and prints.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from emodistill.benchmarks.machine import describe_machine
from emodistill.benchmarks.scatter import KIND_NAMES, Point, draw_mark, draw_scatter

__all__ = ["format_score", "format_size", "render_page"]

# A model that scores this far below the best would flatten all others in the plot; it is named beneath instead.
PLOTTED_RANGE_F1 = 0.4

STYLE = """
:root { color-scheme: light dark;
  --paper: #fcfcfa; --card: #ffffff; --ink: #1d2126; --muted: #5d6672; --line: #d9dde2; --grid: #eceef0;
  --baseline: #7b8591; --member: #2f6fbd; --ensemble: #8a3ea8; --student: #c2570c; --good: #1f7a45; --bar: #7ea9dc; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15181c; --card: #1c2026; --ink: #e6e9ed; --muted: #9aa4b0; --line: #343b44; --grid: #272d35;
  --baseline: #97a1ad; --member: #6aa5ec; --ensemble: #c58be0; --student: #f0914b; --good: #62c08a; --bar: #4676ad; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; } h2 { font-size: 18px; margin: 40px 0 8px; }
p { margin: 6px 0; max-width: 75ch; } .muted, figcaption, caption { color: var(--muted); font-size: 13px; }
.facts { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 0; padding: 0; list-style: none; }
.facts li { flex: 1 1 180px; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 14px; }
.facts b { display: block; font-size: 22px; line-height: 1.25; font-variant-numeric: tabular-nums; }
figure { margin: 12px 0 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
.scroll { overflow-x: auto; } svg { display: block; width: 100%; min-width: 560px; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
svg .tick, svg .axis { fill: var(--muted); } svg .grid { stroke: var(--grid); } svg .frontier { stroke: var(--muted);
  stroke-dasharray: 4 4; fill: none; } svg .halo { paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
.baseline { color: var(--baseline); } .member { color: var(--member); } .ensemble { color: var(--ensemble); }
.student { color: var(--student); } .legend { display: flex; flex-wrap: wrap; gap: 4px 18px; }
.legend span { white-space: nowrap; } .legend svg, td svg { display: inline-block; width: 14px;
  min-width: 0; height: 14px; vertical-align: -2px; margin-right: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; font-size: 13px; color: var(--muted); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; } td.text { text-align: left; white-space: normal; }
td.best { font-weight: 700; } small { color: var(--muted); font-weight: 400; }
td.bar { background: linear-gradient(90deg, var(--bar) var(--share), var(--grid) var(--share)) no-repeat 10px 100%;
  background-size: calc(100% - 20px) 3px; }
.kept { color: var(--good); font-weight: 600; } .refused { color: var(--muted); }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media print { figure, .facts li { break-inside: avoid; } }
"""


def format_score(score: float | None) -> str:
    """Write a score with four decimals, "n/a" where it is not defined."""
    return "n/a" if score is None else f"{score:.4f}"


def format_size(size_bytes: int | None) -> str:
    """Write a size in megabytes (10^6 bytes), "-" where it is not known.

    Examples
    --------
    >>> format_size(9_640_000)
    '9.6 MB'
    """
    return "-" if size_bytes is None else f"{size_bytes / 1e6:.1f} MB"


def render_page(report: Mapping[str, Any]) -> str:
    """Render what `tradeoff.json` holds.

    Parameters
    ----------
    report : mapping
        See `emodistill.benchmarks.tradeoff.build_report`.

    Returns
    -------
    str
        A whole HTML document.
    """
    models = report["models"]
    body = [
        f"<h1>{escape(report['title'])}</h1>",
        f"<p class='muted'>Scored on {models[0]['n_rows']:,} rows of {escape(report['scored_on'])}. "
        "Intervals are 95 % bootstrap intervals over rows.</p>",
        _facts(models),
        "<h2>Latency against micro-F1</h2>",
        _figure(models),
        "<h2>Models</h2>",
        _models_table(models),
        "<h2>F1 per label</h2>",
        _labels_table(report["label_names"], models),
    ]
    if report["referee_steps"]:
        body += ["<h2>What the referee kept</h2>", _referee_table(report["referee_steps"])]
    if report["notes"]:
        body += ["<h2>Notes</h2>", "<ul>", *(f"<li>{escape(note)}</li>" for note in report["notes"]), "</ul>"]
    body += ["<h2>How it was measured</h2>", *_machine(report["machine"], models)]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(report['title'])}: trade-off</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _facts(models: Sequence[Mapping[str, Any]]) -> str:
    """Say the report's few most asked-for numbers: the best ensemble, the fastest student, and what lies between."""
    facts = []
    ensemble = _best([model for model in models if model["kind"] == "ensemble"])
    students = [model for model in models if model["kind"] == "student"]
    student = min((model for model in students if model["latency"]), key=_p50, default=_best(students))
    if ensemble is not None:
        facts.append((format_score(ensemble["micro_f1"]), f"micro-F1 of {ensemble['name']}"))
    if student is not None:
        facts.append((format_score(student["micro_f1"]), f"micro-F1 of {student['name']}"))
        if student["latency"]:
            facts.append((f"{_p50(student):.2f} ms", f"median for one text, {student['name']}"))
        if student["size_bytes"]:
            facts.append((format_size(student["size_bytes"]), f"to ship, {student['name']}"))
        if ensemble is not None and ensemble["latency"] and student["latency"]:
            facts.append((f"{_p50(ensemble) / _p50(student):,.0f} times", f"faster than {ensemble['name']}"))
    items = (f"<li><b>{escape(value)}</b>{escape(meaning)}</li>" for value, meaning in facts)
    return f"<ul class='facts'>{''.join(items)}</ul>"


def _figure(models: Sequence[Mapping[str, Any]]) -> str:
    scored = [model for model in models if model["latency"] and _p50(model) > 0 and model["micro_f1"] is not None]
    best = max((model["micro_f1"] for model in scored), default=0.0)
    shown = [model for model in scored if model["micro_f1"] >= best - PLOTTED_RANGE_F1]
    if not shown:
        return "<p>No model was both scored and timed.</p>"
    points = [
        Point(
            name=model["name"],
            kind=model["kind"],
            x=_p50(model),
            y=model["micro_f1"],
            y_interval=tuple(model["micro_f1_interval"]) if model["micro_f1_interval"] else None,
        )
        for model in shown
    ]
    legend = "".join(f"<span>{_mark(kind)}{escape(KIND_NAMES[kind])}</span>" for kind in _kinds(shown))
    left_out = [
        f"{model['name']} (micro-F1 {format_score(model['micro_f1'])}" + (")" if model["latency"] else ", not timed)")
        for model in models
        if model not in shown
    ]
    caption = (
        "Up and to the left is better. Bars are 95 % intervals; "
        "the dashed line joins the models that no other beats in both."
    )
    if left_out:
        caption += f" Not drawn: {', '.join(left_out)}."
    return (
        f"<figure><div class='legend'>{legend}</div><div class='scroll'>"
        + draw_scatter(
            points, x_title="median latency of one text, tokenizing included (ms, log scale)", y_title="micro-F1"
        )
        + f"</div><figcaption>{escape(caption)}</figcaption></figure>"
    )


def _models_table(models: Sequence[Mapping[str, Any]]) -> str:
    heads = ("model", "micro-F1", "95 % interval", "macro-F1", "p50 ms", "p95 ms", "without tokenizing", "size")
    best = max((model["micro_f1"] for model in models if model["micro_f1"] is not None), default=None)
    rows = []
    for model in models:
        interval, latency = model["micro_f1_interval"], model["latency"]
        note = f"<br><small>{escape(model['note'])}</small>" if model["note"] else ""
        mark = " class='best'" if model["micro_f1"] is not None and model["micro_f1"] == best else ""
        rows.append(
            f"<td>{_mark(model['kind'])}{escape(model['name'])}{note}</td><td{mark}>{format_score(model['micro_f1'])}</td>"
            + _cells(
                f"{interval[0]:.4f} – {interval[1]:.4f}" if interval else "n/a",
                format_score(model["macro_f1"]),
                f"{latency['with_tokenizing']['p50_ms']:.2f}" if latency else "-",
                f"{latency['with_tokenizing']['p95_ms']:.2f}" if latency else "-",
                f"{latency['without_tokenizing']['p50_ms']:.2f}" if latency else "-",
                format_size(model["size_bytes"]),
            )
        )
    return _table(heads, rows)


def _labels_table(label_names: Sequence[str], models: Sequence[Mapping[str, Any]]) -> str:
    support = models[0]["support"]
    heads = ["model", *(f"{escape(name)}<br><small>{support[name]:,} rows</small>" for name in label_names)]
    rows = []
    for model in models:
        cells = []
        for name in label_names:
            f1 = model["per_label_f1"][name]
            share = f" class='bar' style='--share: {100 * f1:.0f}%'" if f1 is not None else ""
            cells.append(f"<td{share}>{'n/a' if f1 is None else f'{f1:.3f}'}</td>")
        rows.append(f"<td>{escape(model['name'])}</td>{''.join(cells)}")
    note = "n/a: no true and no predicted row; such a label is left out of macro-F1."
    return _table(heads, rows, escaped=True) + f"<p class='muted'>{note}</p>"


def _referee_table(steps: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for step in steps:
        verdict = "<span class='kept'>kept</span>" if step["kept"] else "<span class='refused'>refused</span>"
        gain = "" if step["difference"] is None else f"{step['difference']:+.4f}"
        interval = "" if step["low"] is None else f"{step['low']:+.4f} to {step['high']:+.4f}"
        rows.append(
            f"<td>{escape(step['name'])}</td>{_cells(format_score(step['score']), gain, interval)}"
            f"<td>{verdict}</td><td class='text'>{escape(step['reason'])}</td>"
        )
    intro = (
        "<p class='muted'>Tried on out-of-fold rows of train, simplest first, by second-level cross-fitting over "
        "the member folds (the members are not refitted). A step is kept only if its gain's 95 % interval lies "
        "above 0.</p>"
    )
    heads = ("step", "score", "gain", "95 % interval", "verdict", "<span class='text'>why</span>")
    return intro + _table(heads, rows, escaped=True)


def _machine(machine: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> list[str]:
    timed = next((model["latency"]["with_tokenizing"] for model in models if model["latency"]), None)
    lines = [f"<p>{escape(describe_machine(dict(machine)))}</p>", f"<p><code>{escape(machine['command'])}</code></p>"]
    if timed:
        lines.insert(
            0,
            f"<p>One text per call, {timed['n_texts']:,} texts, {timed['n_repeats']} rounds, models in turn in each "
            f"round, {timed['n_warmup']} calls of warm-up before each.</p>",
        )
    return lines


def _table(heads: Iterable[str], rows: Iterable[str], *, escaped: bool = False) -> str:
    head = "".join(f"<th>{text if escaped else escape(text)}</th>" for text in heads)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"


def _cells(*texts: str) -> str:
    return "".join(f"<td>{escape(text)}</td>" for text in texts)


def _mark(kind: str) -> str:
    return f"<svg viewBox='0 0 14 14' class='{kind}' aria-hidden='true'>{draw_mark(kind, 7, 7)}</svg>"


def _kinds(models: Sequence[Mapping[str, Any]]) -> list[str]:
    return [kind for kind in KIND_NAMES if any(model["kind"] == kind for model in models)]


def _best(models: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return max(models, key=lambda model: model["micro_f1"] or 0.0, default=None)


def _p50(model: Mapping[str, Any]) -> float:
    p50: float = model["latency"]["with_tokenizing"]["p50_ms"]
    return p50
