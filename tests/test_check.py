"""`emodistill check`: what a file holds, and all that is wrong with it at once."""

import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from emodistill.checking import check_file, is_blank
from emodistill.cli.check import check

CASES = Path(__file__).parent / "cases"
SEVEN = ["admiration", "amusement", "gratitude", "love", "pride", "relief", "remorse"]
FAULTY = (
    b"\xef\xbb\xbftext,love,joy,love\r\n"
    b"x,1,0,1\r\n"
    b'"two\nlines",2,0,1\r\n'
    b"short,1\r\n"
    b"caf\xe9,1,,0\r\n"
    b"fine,0,1,0\r\n"
    b"\r\n"
    b"FINE,0,1,0\r\n"
    b" ,0,1,0\r\n"
    b'"open,0,0,0\r\n'
)


def test_all_faults_of_a_file_are_listed_by_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "faulty.csv"
    path.write_bytes(FAULTY)
    report = check_file(path)
    # The header is line 1; the record that starts on line 3 fills lines 3 and 4; line 8 is blank.
    assert [(problem.line, problem.column) for problem in report.problems] == [
        (1, "love"),
        (3, "love"),
        (5, None),
        (6, "text"),
        (6, "joy"),
        (11, None),
    ]
    assert [problem.message.split(":")[0] for problem in report.problems] == [
        "'love' occurs twice (columns 2, 4)",
        "'2' is not a label value",
        "2 fields where the header has 4",
        "byte 0xe9 after 'caf' is not UTF-8",
        "the label value is empty",
        "a double quote is opened and never closed",
    ]
    assert report.n_problems == 6
    assert not report.ok
    assert (report.format, report.encoding, report.line_end) == ("CSV", "UTF-8 with BOM", "CRLF")
    assert (report.n_rows, report.n_duplicate_texts, report.n_blank_texts) == (6, 1, 1)
    assert "1 blank line skipped" in report.warnings
    assert report.size_bytes == len(FAULTY)


def test_a_line_with_two_faults_has_both_listed(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b'text,a\ncaf\xe9,1,0\n"caf\xe9" x,1\nfine\0,1\n')
    problems = check_file(tmp_path / "x.csv").problems
    assert [(problem.line, problem.column) for problem in problems] == [
        (2, None),
        (2, None),
        (3, None),
        (3, None),
        (4, "text"),
    ]
    assert [problem.message.split()[0] for problem in problems] == ["byte", "3", "a", "byte", "a"]


def test_what_a_sound_file_holds() -> None:
    report = check_file(CASES / "D05_float_labels.csv")
    assert report.ok
    assert report.problems == []
    assert report.warnings == []
    assert report.columns == ["text", *SEVEN]
    assert report.n_rows == 40
    assert report.positives == dict(zip(SEVEN, [5, 5, 6, 6, 5, 5, 5], strict=True))
    assert report.n_without_label == 5
    assert (report.encoding, report.line_end, report.has_ids) == ("UTF-8", "LF", False)
    assert report.longest_text is not None
    assert (report.longest_text.line, report.longest_text.n_characters, report.longest_text.n_words) == (2, 40, 8)


def test_d07_a_label_without_positives_is_a_warning() -> None:
    report = check_file(CASES / "D07_zero_positive_train.csv")
    assert report.ok
    assert report.positives["relief"] == 0
    assert report.warnings == ["the label 'relief' has no positives: it cannot be learned, and its F1 is undefined"]


def test_d20_texts_without_tokens_are_counted() -> None:
    for name in ("D20_empty_texts.csv", "D20_empty_texts.jsonl"):
        report = check_file(CASES / name)
        assert report.ok
        assert (report.n_rows, report.n_blank_texts, report.has_ids) == (8, 5, True)
        assert report.warnings == ["5 texts without a visible character"]
    assert is_blank("\ufeff\u200d\n")
    assert not is_blank("\U0001f602")


def test_d28_is_a_sound_file() -> None:
    report = check_file(CASES / "D28_blank_lines.jsonl")
    assert report.ok
    assert (report.n_rows, report.encoding, report.line_end) == (4, "UTF-8 with BOM", "CRLF")
    assert report.warnings == ["2 blank lines skipped"]


@pytest.mark.parametrize(
    ("content", "warning"),
    [
        ("text,a\nx,0\ny,0\n", "every label value is 0: the labels look like placeholders"),
        ("text,a\nx,\ny,\n", "no row has labels: the file is read as texts without labels"),
        ("text,a\nx,1\ny,1\n", "the label 'a' is 1 in every row: it cannot be learned"),
        ("text,a\nx,1\ny,0\n", "the label 'a' has only 1 positive row"),
        ("text,a\nx,1\nX,0\n", "1 duplicate text with other labels than the first of its kind"),
        ("id,text\n7,x\n7,y\n7,z\n", "2 duplicate ids (first: '7' at line 3)"),
        ("text\ncaf\ufffd\n", "1 text with U+FFFD, the mark of an earlier wrong decoding"),
    ],
)
def test_what_may_not_be_meant_is_a_warning(tmp_path: Path, content: str, warning: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(content, encoding="utf-8")
    report = check_file(path)
    assert report.ok
    assert warning in report.warnings


def test_of_many_equal_faults_ten_are_shown_and_all_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,a\n" + "x,2\n" * 25 + "y,1\n" * 30)
    report = check_file(path)
    assert report.n_problems == 25
    assert [problem.line for problem in report.problems] == [*range(2, 12), None]
    assert report.problems[-1].message == "15 more like this (not a label value)"


def test_asked_labels_are_looked_for_and_other_columns_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,author,a\nx,ann,1\ny,bob,0\nz,cid,0\n")
    assert check_file(path).n_problems == 1
    assert check_file(path, label_names=["a"]).positives == {"a": 1}
    assert check_file(path, label_names=["a"]).ok
    assert check_file(path, texts_only=True).positives == {}
    [problem] = check_file(path, label_names=["a", "b"]).problems
    assert (problem.line, problem.column) == (1, "b")


def test_a_file_is_checked_within_a_second(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,a,b,c\n" + "".join(f"row {i} thanks you for the café,0,1,0\n" for i in range(25_000)))
    start = time.perf_counter()
    assert check_file(path).n_rows == 25_000
    assert time.perf_counter() - start < 1.5  # measured: 0.15 s


# The command.


def test_the_command_exits_with_0_and_shows_what_is_there() -> None:
    result = CliRunner().invoke(check, [str(CASES / "D05_int_twin.csv")])
    assert result.exit_code == 0
    assert "40 rows; columns: text, admiration, amusement" in result.output
    assert "gratitude           6  15.00%" in result.output
    assert "longest text: 40 characters, 8 words (line 2)" in result.output
    assert result.output.endswith("  no problems\n")


def test_the_command_exits_with_2_and_names_every_file(tmp_path: Path) -> None:
    (tmp_path / "faulty.csv").write_bytes(FAULTY)
    paths = [CASES / "D06_label_two.csv", tmp_path / "none.csv", CASES / "D05_int_twin.csv", tmp_path / "faulty.csv"]
    result = CliRunner().invoke(check, [str(path) for path in paths])
    assert result.exit_code == 2
    assert "problem: line 5, column 'love': '2' is not a label value: write 0 or 1" in result.output
    assert "problem: no such file: check the path" in result.output
    assert "6 problems" in result.output
    assert [line.startswith(str(path)) for path in paths for line in result.output.splitlines()].count(True) == 4


def test_the_command_writes_a_line_of_json_for_each_file() -> None:
    names = ["D06_label_two.csv", "D05_int_twin.csv"]
    result = CliRunner().invoke(check, ["--json", *(str(CASES / name) for name in names)])
    assert result.exit_code == 2
    bad, good = map(json.loads, result.output.splitlines())
    assert bad["ok"] is False
    [problem] = bad["problems"]
    assert (problem["line"], problem["column"]) == (5, "love")
    assert "'2' is not a label value" in problem["message"]
    assert good["ok"] is True
    assert good["positives"]["gratitude"] == 6
    assert good["longest_text"] == {"line": 2, "n_characters": 40, "n_words": 8}


def test_undecodable_names_do_not_stop_the_command(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"text,caf\xe9\nx,1\n")
    for options in ([], ["--json"]):
        result = CliRunner().invoke(check, [*options, str(tmp_path / "x.csv")])
        assert result.exit_code == 2
        assert "byte 0xe9" in result.output


def test_the_command_takes_label_names(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,author,a\nx,ann,1\ny,bob,0\nz,cid,0\n")
    assert CliRunner().invoke(check, [str(tmp_path / "x.csv")]).exit_code == 2
    assert CliRunner().invoke(check, ["--labels", "a", str(tmp_path / "x.csv")]).exit_code == 0
    assert CliRunner().invoke(check, ["--texts-only", str(tmp_path / "x.csv")]).exit_code == 0
