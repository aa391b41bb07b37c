"""The trade-off report of a run: scored models to a text table, `tradeoff.json` and one HTML page.

    results = [ModelResult.from_decisions("ensemble", "ensemble", y_true, y_pred, label_names,
                                          latency=report, size_bytes=...), ...]
    report = build_report(run_dir, results, title="demo", scored_on="dev.csv", machine=machine_record(threads=1),
                          referee_steps=[RefereeStep(...)], notes=["relief has 3 positives in train"])
    print(format_table(results))

`build_report` writes `RUN/report/tradeoff.json` and `RUN/report/index.html` (which needs no other file and no network)
and returns what `tradeoff.json` holds.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from emodistill.artifacts import write_bytes, write_json
from emodistill.benchmarks.latency import LatencyReport
from emodistill.benchmarks.page import format_score, format_size, render_page
from emodistill.metrics import bootstrap_interval, f1_report

__all__ = ["ModelKind", "ModelResult", "RefereeStep", "build_report", "format_table"]

REPORT_FORMAT = 1
DECIMALS = 6

ModelKind = Literal["baseline", "member", "ensemble", "student"]


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """One row of the table.

    Attributes
    ----------
    name : str
        Such as "minilm-l6", "ensemble", "tiny int8".
    kind : {"baseline", "member", "ensemble", "student"}
        Decides the mark in the plot and the group in the table.
    n_rows : int
        Rows that were scored.
    micro_f1, macro_f1 : float or None
        In [0, 1]; None where nothing is true and nothing was predicted.
    micro_f1_interval : (float, float) or None
        95 % percentile interval of the row bootstrap.
    per_label_f1 : dict of str to float or None
        In the order of the file's columns; None for a label with no true and no predicted row.
    support : dict of str to int
        True rows of each label.
    latency : LatencyReport or None
        None where the model was not timed.
    size_bytes : int or None
        What has to be shipped: graph or weights; an ensemble counts all its members.
    note : str
        A clause for the page, such as "average of 4 members".
    """

    name: str
    kind: ModelKind
    n_rows: int
    micro_f1: float | None
    micro_f1_interval: tuple[float, float] | None
    macro_f1: float | None
    per_label_f1: dict[str, float | None]
    support: dict[str, int]
    latency: LatencyReport | None = None
    size_bytes: int | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ModelKind):
            raise ValueError(f"kind is {self.kind!r}: give one of {', '.join(get_args(ModelKind))}")

    @classmethod
    def from_decisions(
        cls,
        name: str,
        kind: ModelKind,
        y_true: npt.ArrayLike,
        y_pred: npt.ArrayLike,
        label_names: Sequence[str],
        *,
        latency: LatencyReport | None = None,
        size_bytes: int | None = None,
        note: str = "",
        n_resamples: int = 2000,
        seed: int = 0,
    ) -> Self:
        """Score decisions against the truth.

        Parameters
        ----------
        name, kind, latency, size_bytes, note
            See `ModelResult`.
        y_true, y_pred : int8 array of shape (n_rows, n_labels), in {0, 1}
            Truth and decisions, rows in the same order.
        label_names : sequence of str
            Of the columns.
        n_resamples, seed : int
            Of the row bootstrap; one seed gives all models the same resamples.
        """
        report = f1_report(y_true, y_pred, label_names)
        low, high = bootstrap_interval(y_true, y_pred, n_resamples=n_resamples, seed=seed)
        return cls(
            name=name,
            kind=kind,
            n_rows=report["n_rows"],
            micro_f1=report["micro_f1"],
            micro_f1_interval=None if np.isnan([low, high]).any() else (low, high),
            macro_f1=report["macro_f1"],
            per_label_f1={label: entry["f1"] for label, entry in report["per_label"].items()},
            support={label: entry["support"] for label, entry in report["per_label"].items()},
            latency=latency,
            size_bytes=size_bytes,
            note=note,
        )


@dataclass(frozen=True, kw_only=True)
class RefereeStep:
    """One step that the referee tried on the out-of-fold rows, and what it gained over the step kept before.

    Attributes
    ----------
    name : str
        Such as "shared threshold".
    kept : bool
    score : float
        Cross-fitted score of the step.
    difference, low, high : float or None
        Gain over the step kept before, with its paired 95 % interval; None for the first step.
    reason : str
        Why it was kept or refused, in one clause.
    """

    name: str
    kept: bool
    score: float
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""


def build_report(
    run_dir: Path,
    models: Sequence[ModelResult],
    *,
    title: str,
    scored_on: str,
    machine: dict[str, Any],
    referee_steps: Sequence[RefereeStep] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the report of a run.

    Parameters
    ----------
    run_dir : Path
        The files go to its folder `report`.
    models : sequence of ModelResult
        In the order of the table; at least one.
    title : str
        Name of the run.
    scored_on : str
        Name of the scored file, for people: "dev.csv".
    machine : dict
        From `emodistill.benchmarks.machine.machine_record`.
    referee_steps : sequence of RefereeStep
        In the order in which they were tried.
    notes : sequence of str
        Sentences for the page: warnings, limits, what was not measured.

    Returns
    -------
    dict
        The content of `tradeoff.json`, plain JSON values.
    """
    report = {
        "format": REPORT_FORMAT,
        "title": title,
        "scored_on": scored_on,
        "label_names": list(models[0].per_label_f1),
        "models": [_rounded(asdict(model)) for model in models],
        "referee_steps": [_rounded(asdict(step)) for step in referee_steps],
        "notes": list(notes),
        "machine": machine,
    }
    write_json(run_dir / "report" / "tradeoff.json", report)
    write_bytes(run_dir / "report" / "index.html", render_page(report).encode())
    return report


def format_table(models: Sequence[ModelResult]) -> str:
    """Lay the models out as a table for a terminal; "n/a" is not defined, "-" not measured."""
    header = ("model", "micro-F1", "95 % interval", "macro-F1", "p50 ms", "p95 ms", "size")
    rows = [header, *(_table_row(model) for model in models)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in ([*zip(row, widths, strict=True)] for row in rows)
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _table_row(model: ModelResult) -> tuple[str, ...]:
    interval = model.micro_f1_interval
    latency = model.latency.with_tokenizing if model.latency else None
    return (
        model.name,
        format_score(model.micro_f1),
        f"{interval[0]:.4f}-{interval[1]:.4f}" if interval else "n/a",
        format_score(model.macro_f1),
        f"{latency.p50_ms:.2f}" if latency else "-",
        f"{latency.p95_ms:.2f}" if latency else "-",
        format_size(model.size_bytes),
    )


def _rounded(value: Any) -> Any:
    """Round every float of a JSON value, so that two runs of equal results write equal files."""
    if isinstance(value, float):
        return round(value, DECIMALS)
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return value
