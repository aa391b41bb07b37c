"""The trade-off report: numbers as scored, files as promised, one self-contained page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from emodistill.benchmarks.latency import Latency, LatencyReport
from emodistill.benchmarks.page import format_size
from emodistill.benchmarks.scatter import Point, _log_ticks, _nice_range, draw_scatter, find_frontier
from emodistill.benchmarks.tradeoff import ModelResult, RefereeStep, build_report, format_table

LABELS = ("love", "pride", "relief")
# love: 2 true, 3 predicted, 2 hit: F1 = 2*2 / (2+3) = 0.8; pride: 1 true, none predicted: 0; relief: undefined.
Y_TRUE = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]], np.int8)
Y_PRED = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]], np.int8)
# micro: 2*2 / (3 true + 3 predicted) = 0.6667; macro: (0.8 + 0) / 2 = 0.4
MACHINE = {
    "cpu_model": "Test CPU",
    "cpu_flags": ["avx2"],
    "threads": 1,
    "versions": {"onnxruntime": "1.2.3"},
    "commit": None,
    "date": "2026-01-01 00:00 UTC",
    "command": "make demo",
}
VOID_ELEMENTS = {"meta", "br"}


def latency(p50_ms: float) -> LatencyReport:
    one = Latency(p50_ms=p50_ms, p95_ms=2 * p50_ms, mean_ms=p50_ms, n_texts=4, n_repeats=3, n_warmup=50)
    return LatencyReport(with_tokenizing=one, without_tokenizing=one, tokenizing=one)


def result(name: str = "tiny int8", kind: str = "student", p50_ms: float | None = 0.5) -> ModelResult:
    return ModelResult.from_decisions(
        name,
        kind,  # type: ignore[arg-type]
        Y_TRUE,
        Y_PRED,
        LABELS,
        latency=None if p50_ms is None else latency(p50_ms),
        size_bytes=9_640_000,
        n_resamples=200,
    )


class TagChecker(HTMLParser):
    """Collects tags and fails on one that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onclick"}, "the page needs no other file"
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_result_scores_by_the_one_rule() -> None:
    one = result()
    assert one.micro_f1 == pytest.approx(2 / 3)
    assert one.macro_f1 == pytest.approx(0.4)
    assert one.per_label_f1 == {"love": pytest.approx(0.8), "pride": 0.0, "relief": None}
    assert one.support == {"love": 2, "pride": 1, "relief": 0}
    assert one.n_rows == 4
    assert one.micro_f1_interval is not None
    low, high = one.micro_f1_interval
    assert 0 <= low < 2 / 3 < high <= 1


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'teacher'"):
        result(kind="teacher")


def test_table_shows_numbers_units_and_what_is_missing() -> None:
    lines = format_table([result(), result("mpnet-base", "member", None)]).splitlines()
    assert re.split(r"\s{2,}", lines[0]) == [
        "model",
        "micro-F1",
        "95 % interval",
        "macro-F1",
        "p50 ms",
        "p95 ms",
        "size",
    ]
    cells = re.split(r"\s{2,}", lines[2])
    assert cells[:2] == ["tiny int8", "0.6667"]
    assert cells[3:] == ["0.4000", "0.50", "1.00", "9.6 MB"]
    assert re.split(r"\s{2,}", lines[3])[4:] == ["-", "-", "9.6 MB"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(None, "-"), (0, "0.0 MB"), (8_650_000, "8.7 MB"), (438_000_000, "438.0 MB")]
)
def test_sizes_are_in_millions_of_bytes(size_bytes: int | None, text: str) -> None:
    assert format_size(size_bytes) == text


def test_report_writes_what_it_returns(tmp_path: Path) -> None:
    steps = [
        RefereeStep(name="uniform + 0.5", kept=True, score=0.6, reason="where it starts"),
        RefereeStep(name="per label", kept=False, score=0.61, difference=0.01, low=-0.02, high=0.04, reason="noise"),
    ]
    models = [result("all negative", "baseline"), result("ensemble", "ensemble", 60.0), result()]
    report = build_report(
        tmp_path,
        models,
        title="a <run>",
        scored_on="dev.csv",
        machine=MACHINE,
        referee_steps=steps,
        notes=["few & far"],
    )
    assert json.loads((tmp_path / "report" / "tradeoff.json").read_text()) == report
    assert report["label_names"] == list(LABELS)
    assert [model["name"] for model in report["models"]] == ["all negative", "ensemble", "tiny int8"]
    assert report["models"][2]["micro_f1"] == 0.666667
    assert report["models"][2]["per_label_f1"] == {"love": 0.8, "pride": 0.0, "relief": None}
    assert report["models"][1]["latency"]["with_tokenizing"]["p50_ms"] == 60.0

    checker = TagChecker()
    page = (tmp_path / "report" / "index.html").read_text()
    checker.feed(page)
    assert checker.open == []
    assert checker.seen.count("table") == 3
    assert "script" not in checker.seen
    assert "http" not in page
    assert "a <run>" in checker.text
    assert "few & far" in checker.text
    assert "120 times" in checker.text  # 60.0 ms / 0.5 ms
    assert "+0.0100" in checker.text
    assert "-0.0200 to +0.0400" in checker.text
    assert "prefers-color-scheme: dark" in page


def test_report_of_models_that_were_not_timed_has_no_plot(tmp_path: Path) -> None:
    build_report(tmp_path, [result(p50_ms=None)], title="run", scored_on="dev.csv", machine=MACHINE)
    page = (tmp_path / "report" / "index.html").read_text()
    assert "No model was both scored and timed" in page
    assert "role='img'" not in page


def test_plot_puts_better_higher_and_slower_further_right() -> None:
    points = [
        Point(name="a & b", kind="student", x=1.0, y=0.80, y_interval=(0.78, 0.82)),
        Point(name="slow", kind="ensemble", x=100.0, y=0.90),
        Point(name="middle", kind="member", x=10.0, y=0.85),
    ]
    svg = ElementTree.fromstring(draw_scatter(points, x_title="ms", y_title="micro-F1"))
    middle = svg.find(".//circle")
    assert middle is not None
    polygons = [group.find("polygon") for group in svg.findall("g") if group.get("class") != "member"]
    corners = [p.get("points", "").split() for p in polygons if p is not None]
    centres = [np.mean([[float(v) for v in pair.split(",")] for pair in pairs], axis=0) for pairs in corners]
    x, y = float(middle.get("cx", 0)), float(middle.get("cy", 0))
    assert centres[0][0] < x < centres[1][0]
    assert centres[0][1] > y > centres[1][1]
    # log scale: 10 lies half-way between 1 and 100
    assert x == pytest.approx((centres[0][0] + centres[1][0]) / 2, abs=0.2)
    assert [text.text for text in svg.findall("text[@class='halo']")] == ["a & b", "slow", "middle"]


def test_names_of_close_models_do_not_cover_each_other() -> None:
    points = [Point(name=f"minilm-{i}", kind="member", x=5 + 0.1 * i, y=0.85 + 0.001 * i) for i in range(5)]
    svg = ElementTree.fromstring(draw_scatter(points, x_title="ms", y_title="F1"))
    places = [(float(t.get("x", 0)), float(t.get("y", 0))) for t in svg.findall("text[@class='halo']")]
    for i, (x, y) in enumerate(places):
        for other_x, other_y in places[i + 1 :]:
            assert abs(x - other_x) >= 40 or abs(y - other_y) >= 12


def test_frontier_holds_what_no_other_beats() -> None:
    names = {
        "fast": (1, 0.80),
        "dominated": (2, 0.79),
        "better": (3, 0.85),
        "same score, slower": (4, 0.85),
        "best": (9, 0.9),
    }
    points = [Point(name=name, kind="member", x=x, y=y) for name, (x, y) in names.items()]
    assert [point.name for point in find_frontier(points)] == ["fast", "better", "best"]


def test_axes_have_round_ticks() -> None:
    assert _log_ticks(0.3, 70) == [0.5, 1, 2, 5, 10, 20, 50]
    # 0.78 to 0.89 in steps of at least 0.022: 0.05; from 0.75 to 0.90
    assert _nice_range([0.78, 0.89]) == pytest.approx((0.75, 0.90, 0.05))
    # one value alone still gets an axis of 0.01
    assert _nice_range([1.0, 1.0]) == pytest.approx((0.998, 1.0, 0.002))
    low, high, step = _nice_range([0.85, 0.85])
    assert low <= 0.85 <= high
    assert step == pytest.approx(0.002)
