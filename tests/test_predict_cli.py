"""emodistill predict: tables and JSON for texts, files of any size in their order, nothing half written."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("onnx", reason="needs the train extra to write graphs")

from bundles import CASES, LABEL_NAMES, write_bundle

from emodistill.cli import main
from emodistill.runtime import Classifier

EMODISTILL = [sys.executable, "-c", "from emodistill.cli import main; main()"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


def run(*arguments: object, stdin: bytes | None = None):
    return CliRunner().invoke(main, ["predict", *map(str, arguments)], input=stdin)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


# ---------------------------------------------------------------- texts


def test_texts_give_a_table(bundle):
    result = run("--model", bundle, "thank you", "so sorry\nand thank you", "ok")
    assert result.exit_code == 0, result.output
    # By hand: (50 + noise) / 4 - 3 is above 9, (50 + noise) / 9 - 3 is 2.6 or 0.93; two lines become one.
    assert result.stdout.splitlines() == [
        "text                    labels",
        "thank you               gratitude 1.00",
        "so sorry and thank you  gratitude 0.93, remorse 0.93",
        "ok                      -",
    ]


def test_all_probabilities_in_the_table(bundle):
    lines = run("--model", bundle, "--probabilities", "love").stdout.splitlines()
    assert lines[0].split() == ["text", *LABEL_NAMES, "labels"]
    cells = lines[1].split()
    expected = Classifier.load(bundle).predict_proba(["love"])[0]
    np.testing.assert_allclose([float(cell) for cell in cells[1:8]], expected, atol=5e-4)
    assert cells[8] == "love"


def test_long_texts_do_not_break_the_table(bundle):
    lines = run("--model", bundle, "ok " * 100, "ok").stdout.splitlines()
    assert [line.index(end) for line, end in zip(lines, ("labels", "-", "-"), strict=True)] == [62, 62, 62]


def test_json_lines_hold_all_probabilities(bundle):
    lines = run("--model", bundle, "--json", "thank you", "café").stdout.splitlines()
    first, second = map(json.loads, lines)
    assert (first["text"], first["labels"]) == ("thank you", ["gratitude"])
    assert (second["text"], second["labels"]) == ("café", [])
    expected = Classifier.load(bundle).predict_proba(["thank you"])[0]
    assert list(first["probabilities"]) == list(LABEL_NAMES)
    np.testing.assert_allclose(list(first["probabilities"].values()), expected, atol=1e-6)
    assert "probabilities" not in json.loads(run("--model", bundle, "--json", "--no-probabilities", "ok").stdout)


def test_standard_input_is_one_text_per_line(bundle):
    stdin = "\ufeffthank you\r\n\nlove\tlove\nNA".encode()
    result = run("--model", bundle, "--json", "--batch-size", 2, "-", stdin=stdin)
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["text"] for record in records] == ["thank you", "", "love\tlove", "NA"]
    assert [record["labels"] for record in records] == [["gratitude"], [], ["love"], []]


def test_standard_input_that_is_not_utf8_is_named_by_line(bundle):
    result = run("--model", bundle, "--batch-size", 1, "-", stdin=b"ok\ncaf\xe9\n")
    assert result.exit_code == 2
    assert "standard input, line 2: not UTF-8" in result.stderr


def test_an_argument_that_is_not_utf8_is_answered(bundle):
    command = [*EMODISTILL, "predict", "--model", str(bundle)]
    for option in ([], ["--json"]):
        done = subprocess.run([*map(os.fsencode, command + option), b"thanks \xff"], capture_output=True)
        assert done.returncode == 0, done.stderr
        assert b"gratitude" in done.stdout


def test_cut_texts_are_counted(bundle):
    result = run("--model", bundle, "ok " * 200, "ok")
    assert result.stderr == "1 text was cut at 128 tokens\n"


def test_graph_and_threads_are_passed_on(bundle):
    result = run("--model", bundle, "--graph", "fp8", "ok")
    assert result.exit_code == 2
    assert "choose one of 'model_fast', 'model'" in result.stderr
    assert run("--model", bundle, "--graph", "model", "--threads", 1, "ok").exit_code == 0
    assert run("--model", bundle, "--threads", 0, "ok").exit_code == 2


# ---------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to label: give texts, '-' for standard input, or --input FILE --output FILE"),
        (["ok", "--input", "a.csv", "--output", "b.csv"], "give texts or --input, not both"),
        (["--input", "a.csv"], "--output is missing"),
        (["--output", "a.csv", "ok"], "--input is missing"),
        (["-", "ok"], "'-' reads all texts from standard input"),
        (["--keep", "user", "ok"], "it needs --input"),
        (["--input", "a.csv", "--output", "b.csv", "--json"], "give an --output ending in .jsonl"),
        (["--input", "a.csv", "--output", "./a.csv"], "--output is the input file itself"),
    ],
)
def test_misuse_is_explained(bundle, arguments, message):
    result = run("--model", bundle, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_folder_that_is_no_bundle_is_one_sentence(tmp_path):
    result = run("--model", tmp_path, "ok")
    assert result.exit_code == 2
    assert "is no bundle: it has no emodistill.json" in result.stderr
    assert len(result.stderr.splitlines()) == 1


# ---------------------------------------------------------------- files


def test_a_csv_file_keeps_ids_texts_and_order(bundle, tmp_path):
    out = tmp_path / "new folder" / "out.csv"
    result = run("--model", bundle, "--input", CASES / "D20_empty_texts.csv", "--output", out, "--batch-size", 3)
    assert result.exit_code == 0, result.output
    given, rows = read_csv(CASES / "D20_empty_texts.csv"), read_csv(out)
    assert [(row["id"], row["text"]) for row in rows] == [(row["id"], row["text"]) for row in given]
    scores = Classifier.load(bundle).score([row["text"] for row in given])
    found = [[float(row[f"probability_{name}"]) for name in LABEL_NAMES] for row in rows]
    np.testing.assert_allclose(found, scores.probabilities, atol=1e-6)
    assert [[int(row[name]) for name in LABEL_NAMES] for row in rows] == scores.decisions.tolist()
    summary = json.loads(result.stdout.splitlines()[-1])
    assert (summary["rows"], summary["without_tokens"], summary["cut"]) == (8, 5, 0)
    assert summary["positives"] == {name: int(name == "gratitude") for name in LABEL_NAMES}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("graph", ["model_fast", "model"])
def test_all_formats_agree(bundle, tmp_path, suffix, graph):
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="needs the parquet extra")
    middle, back = tmp_path / f"middle.{suffix}", tmp_path / "back.csv"
    direct = tmp_path / "direct.csv"
    source = CASES / "D20_empty_texts.jsonl"
    for given, output in ((source, direct), (source, middle), (middle, back)):
        result = run("--model", bundle, "--graph", graph, "--input", given, "--output", output)
        assert result.exit_code == 0, result.output
    assert back.read_bytes() == direct.read_bytes()


def test_columns_are_kept_on_request(bundle, tmp_path):
    (tmp_path / "in.csv").write_text('text,user,love\nok,"a,b",7\n', encoding="utf-8")
    result = run(
        "--model", bundle, "--input", tmp_path / "in.csv", "--output", tmp_path / "o.csv", "--keep", "user",
        "--no-probabilities",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (row,) = read_csv(tmp_path / "o.csv")
    assert list(row) == ["text", "user", *LABEL_NAMES]
    assert (row["user"], row["love"]) == ("a,b", "0")  # the model's love, not the file's


FAULTS = {
    "no such file": (None, "no such file"),
    "no text column": ("texts,id\nok,1\n", "no column 'text'"),
    "a short row at the end": ("text,id\n" + "ok,1\n" * 5000 + "ok\n", "line 5002"),
    "nothing": ("", "the file is empty"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("old", [None, "old predictions"])
def test_faults_leave_no_output(bundle, tmp_path, name, old):
    content, message = FAULTS[name]
    if content is not None:
        (tmp_path / "in.csv").write_text(content, encoding="utf-8")
    out = tmp_path / "results" / "out.csv"
    out.parent.mkdir()
    if old:
        out.write_text(old)
    result = run("--model", bundle, "--input", tmp_path / "in.csv", "--output", out)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert [path.read_text() for path in out.parent.iterdir()] == ([old] if old else [])


def test_an_unknown_output_format_is_refused_before_the_work(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(Classifier, "score", lambda *_: pytest.fail("the work was begun"))
    result = run("--model", bundle, "--input", CASES / "D21_long.csv", "--output", tmp_path / "out.xlsx")
    assert result.exit_code == 2
    assert ".xlsx" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_as_file(bundle, tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    result = run("--model", bundle, "--input", tmp_path / "pipe.csv", "--output", tmp_path / "out.csv")
    assert result.exit_code == 2
    assert "is not a regular file" in result.stderr


def test_a_file_that_shrinks_meanwhile_leaves_no_output(bundle, tmp_path, monkeypatch):
    given = tmp_path / "in.csv"
    given.write_text("text\n" + "ok\n" * 100_000, encoding="utf-8")  # far longer than a read buffer
    original = Classifier.score

    def score_and_shrink(self, texts):
        given.write_text("text\nok\n", encoding="utf-8")
        return original(self, texts)

    monkeypatch.setattr(Classifier, "score", score_and_shrink)
    result = run("--model", bundle, "--input", given, "--output", tmp_path / "out.csv")
    assert result.exit_code == 2
    assert "changed while it was read (100,000 rows, then" in result.stderr
    assert not (tmp_path / "out.csv").exists()


# ---------------------------------------------------------------- large files


MEASURE = """
import sys
from emodistill.benchmarks.machine import peak_memory_bytes
from emodistill.cli import main
try:
    main(sys.argv[1:])
finally:
    print(peak_memory_bytes() // 1024, file=sys.stderr)
"""


def peak_kib(bundle: Path, given: Path, out: Path, *options: str) -> int:
    arguments = ["predict", "--model", str(bundle), "--input", str(given), "--output", str(out), *options]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.splitlines()[-1])


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_file(bundle, tmp_path, suffix):
    pytest.importorskip("resource", reason="this system does not tell a process's peak memory")
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="needs the parquet extra")
    words = np.array(["thank", "you", "so", "sorry", "love", "this", "great", "job", ",", "."])
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, size)) for size in rng.integers(1, 40, 50_000)]
    peaks = {}
    for n_rows in (2_000, 50_000):
        given, out = tmp_path / f"{n_rows}.csv", tmp_path / f"{n_rows}_out.{suffix}"
        with given.open("w", encoding="utf-8", newline="") as handle:
            csv.writer(handle, lineterminator="\n").writerows([["id", "text"], *enumerate(lines[:n_rows])])
        peaks[n_rows] = peak_kib(bundle, given, out, "--graph", "model")
    # 50,000 rows of texts and predictions as Python objects take more than 40 MiB.
    assert peaks[50_000] - peaks[2_000] < 16 * 1024, peaks
    if suffix == "csv":
        rows = read_csv(out)
        assert [(row["id"], row["text"]) for row in rows] == [(str(i), line) for i, line in enumerate(lines)]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_the_stream_benchmark_counts_and_compares_rows(bundle, monkeypatch, suffix):
    pytest.importorskip("resource", reason="this system does not tell a process's peak memory")
    from emodistill.benchmarks import predict_stream
    from emodistill.errors import VerificationError

    measured = predict_stream.measure_stream(bundle, 200, suffix=suffix, graph="model", threads=1)
    assert (measured["rows"], measured["threads"], measured["graph"]) == (200, 1, "onnx/model.onnx")
    assert measured["rows_per_s"] > 0
    assert 20 < measured["peak_memory_mib"] < 500
    # A row that is lost on the way back is noticed, as is one that is changed.
    original = predict_stream._read_rows
    monkeypatch.setattr(predict_stream, "_read_rows", lambda path: list(original(path))[:-1])
    with pytest.raises(VerificationError, match="row 199 of the predictions is None"):
        predict_stream.measure_stream(bundle, 200, suffix=suffix, graph=None, threads=None)
