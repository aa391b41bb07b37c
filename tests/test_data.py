"""Reading: the written cases with their right values, the whole kind of each fault, and files that round-trip."""

import csv
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from emodistill import data, formats
from emodistill.data import (
    file_fingerprint,
    iter_text_records,
    read_dataset,
    read_texts,
    row_fingerprints,
    write_predictions,
)
from emodistill.errors import ConfigError, InputError, MissingExtraError
from emodistill.predictions import csv_line, open_predictions
from emodistill.scanning import parse_label

CASES = Path(__file__).parent / "cases"
SEVEN = ("admiration", "amusement", "gratitude", "love", "pride", "relief", "remorse")
NA_TEXTS = ["NA", "null", "None", "N/A", "nan", "#N/A", "<NA>", "-inf", "thanks for the NA reply", "this is fine"]
SUFFIXES = ["csv", "tsv", "jsonl", *(["parquet"] if importlib.util.find_spec("pyarrow") else [])]
ENCODABLE = st.characters(exclude_categories=("Cs",), exclude_characters="\0")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def records_of(path: Path, **options: object) -> list[data.Record]:
    return [record for chunk in iter_text_records(path, **options) for record in chunk]


# The written cases.


def test_d01_words_for_missing_stay_texts_in_csv_and_jsonl() -> None:
    dataset = read_dataset(CASES / "D01_na_text.csv")
    assert dataset.texts == NA_TEXTS
    assert read_texts(CASES / "D01_na_text.jsonl").texts == NA_TEXTS
    assert dataset.label_names == SEVEN
    assert dataset.labels is not None
    assert dataset.labels.dtype == np.int8
    assert dataset.labels[0].tolist() == [0, 0, 0, 0, 0, 1, 0]
    assert dataset.labels.sum(axis=0).tolist() == [0, 1, 1, 1, 0, 1, 0]


def test_d02_bom_and_crlf_change_nothing() -> None:
    marked, plain = read_dataset(CASES / "D02_bom_crlf.csv"), read_dataset(CASES / "D02_plain_twin.csv")
    assert marked.n_rows == 4
    assert marked.columns == plain.columns == ("text", *SEVEN)
    assert marked.texts == plain.texts
    assert np.array_equal(marked.labels, plain.labels)
    assert not any("\r" in text or "\ufeff" in text for text in (*marked.texts, *marked.columns))


def test_d03_records_are_not_lines_and_predictions_keep_them(tmp_path: Path) -> None:
    expected = [
        "line one\nline two\n\nline four",
        'she said "well done", twice',
        "commas, more, commas",
        "carriage\rreturn inside",
        "ends with a newline\n",
    ]
    assert read_dataset(CASES / "D03_quoted_newlines.csv").texts == expected
    records = records_of(CASES / "D03_quoted_newlines.csv")
    zeros = np.zeros((5, 2))
    for suffix in SUFFIXES:
        out = tmp_path / f"predictions.{suffix}"
        assert write_predictions(out, [(records, zeros, zeros.astype(np.int8))], ["a", "b"]) == 5
        assert read_texts(out).texts == expected
    with open(tmp_path / "predictions.csv", newline="", encoding="utf-8") as stream:
        assert [row["text"] for row in csv.DictReader(stream)] == expected


def test_d04_a_repeated_label_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"line 1, column 'love': 'love' occurs twice \(columns 5, 7\)"):
        read_dataset(CASES / "D04a_duplicate_header.csv")


@pytest.mark.parametrize("require_labels", [True, False])
def test_d04_a_missing_label_is_refused_by_name(require_labels: bool) -> None:
    with pytest.raises(InputError, match="column 'relief': no column for the label 'relief' among text, admiration"):
        read_dataset(CASES / "D04b_missing_label.csv", label_names=SEVEN, require_labels=require_labels)


def test_d05_harmless_spellings_are_the_same_labels() -> None:
    mixed, plain = read_dataset(CASES / "D05_float_labels.csv"), read_dataset(CASES / "D05_int_twin.csv")
    assert mixed.texts == plain.texts
    assert np.array_equal(mixed.labels, plain.labels)
    assert plain.labels is not None
    assert plain.labels.shape == (40, 7)
    assert plain.labels.sum(axis=0).tolist() == [5, 5, 6, 6, 5, 5, 5]


def test_d06_a_two_is_refused_with_line_column_and_value() -> None:
    with pytest.raises(InputError, match=r"D06_label_two.csv, line 5, column 'love': '2' is not a label value"):
        read_dataset(CASES / "D06_label_two.csv")


@pytest.mark.parametrize("chunk_rows", [1, 7, 32, 53, 1000])
def test_d13_rows_come_in_the_order_of_the_file(chunk_rows: int) -> None:
    with open(CASES / "D13_order.csv", newline="", encoding="utf-8") as stream:
        expected = [(row["id"], row["text"]) for row in csv.DictReader(stream)]
    chunks = list(iter_text_records(CASES / "D13_order.csv", chunk_rows))
    assert [(record.id, record.text) for chunk in chunks for record in chunk] == expected
    assert len(expected) == 53
    assert all(len(chunk) == chunk_rows for chunk in chunks[:-1])
    assert expected[:2] == [("k00", "marker00 mirror kettle window haha"), ("k37", expected[1][1])]


def test_d20_texts_without_tokens_are_rows() -> None:
    expected = ["", "   ", "\t", "\u00a0", "\u200b", "\U0001f602" * 3, ".", "thank you"]
    for name in ("D20_empty_texts.csv", "D20_empty_texts.jsonl"):
        dataset = read_texts(CASES / name)
        assert dataset.texts == expected
        assert dataset.ids == [f"e{number}" for number in range(1, 9)]


def test_d21_long_texts_come_whole() -> None:
    texts = {record.id: record.text for record in records_of(CASES / "D21_long.csv")}
    assert len(texts) == 8
    assert len(texts["chars10000"]) == 10_000
    assert len(texts["words600"].split()) == 600


def test_d28_blank_lines_bom_extra_key_and_no_final_newline() -> None:
    records = records_of(CASES / "D28_blank_lines.jsonl")
    assert [record.id for record in records] == ["a", "b", "c", "d"]
    assert [record.text for record in records] == ["thank you", "I am sorry", "haha", "café and café"]
    assert records[2].row == {"text": "haha", "id": "c", "extra": [1, 2]}


# Label values: the whole kind of D05 and D06.


@pytest.mark.parametrize(
    "value", [1, 1.0, True, "1", "1.0", "1.", "1.000", " 1 ", "+1", "true", "True", "TRUE"], ids=repr
)
def test_every_spelling_of_one(value: object) -> None:
    assert parse_label(value) == 1


@pytest.mark.parametrize("value", [0, 0.0, -0.0, False, "0", "0.0", "0.", "-0", "-0.0", "false", "FALSE\r"], ids=repr)
def test_every_spelling_of_zero(value: object) -> None:
    assert parse_label(value) == 0


@pytest.mark.parametrize(
    "value",
    [
        2,
        -1,
        0.5,
        float("nan"),
        float("inf"),
        None,
        [],
        "",
        " ",
        "2",
        "-1",
        "0.5",
        "1.01",
        "yes",
        "nan",
        "١",
        "1,0",
        "10",
    ],
    ids=repr,
)
def test_nothing_else_is_a_label(value: object) -> None:
    assert parse_label(value) is None


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("2", "line 3, column 'b': '2' is not a label value: write 0 or 1"),
        ("", "line 3, column 'b': the label value is empty: write 0 or 1"),
        ("0.5", "line 3, column 'b': '0.5' is not a label value"),
        ("NaN", "line 3, column 'b': 'NaN' is not a label value"),
    ],
)
def test_a_faulty_label_in_csv(tmp_path: Path, cell: str, message: str) -> None:
    path = write(tmp_path / "x.csv", f"text,a,b\nx,0,1\ny,1,{cell}\nz,1,0\nw,1,0\n")
    with pytest.raises(InputError, match=re.escape(message)):
        read_dataset(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("null", "line 2, column 'a': the label value is empty"),
        ("[1]", "line 2, column 'a': [1] is not a label value"),
        ("NaN", "line 2, column 'a': nan is not a label value"),
        ("2", "line 2, column 'a': 2 is not a label value"),
    ],
)
def test_a_faulty_label_in_jsonl(tmp_path: Path, value: str, message: str) -> None:
    lines = ['{"text": "x", "a": true}', f'{{"text": "y", "a": {value}}}', '{"text": "z", "a": "0"}']
    with pytest.raises(InputError, match=re.escape(message)):
        read_dataset(write(tmp_path / "x.jsonl", "\n".join(lines)))


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    # The header is line 1, the first record fills lines 2 to 4 (its bare \r ends none), the faulty one is line 5.
    path = write(tmp_path / "x.csv", 'text,a\n"one\ntwo\rstill two\n",0\nbad,7\nfine,1\nfine,1\n')
    with pytest.raises(InputError, match=r"line 5, column 'a': '7'"):
        read_dataset(path)


def test_only_carriage_returns_end_lines_in_an_old_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "text,a\rone,1\rtwo,3\rthree,0\r")
    with pytest.raises(InputError, match=r"line 3, column 'a': '3'"):
        read_dataset(path)


def test_asked_labels_come_in_the_asked_order_and_other_columns_stay(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "a,id,text,author,b\n1,7,hello,ann,0\n0,8,bye,bob,1\n")
    dataset = read_dataset(path, label_names=["b", "a"])
    assert dataset.label_names == ("b", "a")
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [[0, 1], [1, 0]]
    assert dataset.ids == ["7", "8"]
    assert dataset.columns == ("a", "id", "text", "author", "b")
    assert dataset.other_columns == {"author": ["ann", "bob"]}


def test_a_column_that_holds_no_labels_is_said_once(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "text,author,a\n" + "".join(f"t{i},person {i},1\n" for i in range(50)))
    with pytest.raises(InputError, match=r"'author': is not a column of labels, 50 of its 50 values") as caught:
        read_dataset(path)
    assert "more problem" not in str(caught.value)
    assert "(first: line 2: 'person 0' is not a label value" in str(caught.value)


def test_the_number_of_further_problems_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "text,a\n" + "t,1\n" * 9 + "t,2\nt,3\nt\n")
    with pytest.raises(InputError, match=r"line 11, column 'a': '2' .* \(2 more problems: run  emodistill check "):
        read_dataset(path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_labels_that_may_be_absent(tmp_path: Path, suffix: str) -> None:
    empty = {"csv": "text,a,b\nx,,\ny,,\n", "jsonl": '{"text":"x","a":null,"b":""}\n{"text":"y","a":null,"b":null}'}
    mixed = {"csv": "text,a,b\nx,0,1\ny,,\n", "jsonl": '{"text":"x","a":0,"b":1}\n{"text":"y","a":null,"b":null}'}
    none = {"csv": "text\nx\ny\n", "jsonl": '{"text":"x"}\n{"text":"y"}'}
    for content in (empty, none):
        path = write(tmp_path / f"x.{suffix}", content[suffix])
        dataset = read_dataset(path, label_names=["a", "b"], require_labels=False)
        assert dataset.labels is None
        assert dataset.label_names == ()
        assert dataset.texts == ["x", "y"]
        with pytest.raises(InputError, match="'a'"):
            read_dataset(tmp_path / f"x.{suffix}", label_names=["a", "b"])
    with pytest.raises(InputError, match=r"line [23]: the row has no labels, and line [12] has some"):
        read_dataset(write(tmp_path / f"x.{suffix}", mixed[suffix]), require_labels=False)


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a", "a"], "'a' twice"), (["text"], "'text', which is not a label"), ("ab", "is the string 'ab'")],
)
def test_impossible_label_names(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_dataset(CASES / "D05_int_twin.csv", label_names=names)


# Files that cannot be used, and the sentence each gets.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"", "x.csv: the file is empty"),
        ("x.csv", b"\xef\xbb\xbf", "x.csv: the file has no header line"),
        ("x.csv", b"\n\n", "x.csv: the file has no header line"),
        ("x.csv", b"text,a\n", "x.csv: the file has a header and no rows"),
        ("x.csv", b"text\nx\n", "line 1: no label columns, only text"),
        ("x.csv", b"Text,a\nx,1\n", "line 1: no column 'text' among Text, a: name the column that holds the texts"),
        ("x.csv", b"text;a\nx;1\n", "separated by semicolons"),
        ("x.csv", b"text\ta\nx\t1\n", "separated by tabs: save the file with commas or name it .tsv"),
        ("x.csv", b",text,a\n0,x,1\n", "line 1: column 1 has no name"),
        ("x.csv", b"text, a\nx,1\n", "the name ' a' has spaces around it"),
        ("x.csv", b"text,text,a\nx,y,1\n", "column 'text': 'text' occurs twice (columns 1, 2)"),
        ("x.csv", b"text,a\nx,1\ny\n", "line 3: 1 field where the header has 2"),
        (
            "x.csv",
            b"text,a\nx,1\nyes, yes,0\n",
            "line 3: 3 fields where the header has 2: put a text that holds a comma",
        ),
        ("x.csv", b'text,a\nx,1\n"open,1\nz,0\n', "line 3: a double quote is opened and never closed (up to line 4)"),
        ("x.csv", b'text,a\nx,1\n"a" b,1\n', "line 3: a quoted field goes on after its closing quote"),
        ("x.csv", b"text,a\nx,1\ncaf\xe9,1\n", "line 3, column 'text': byte 0xe9 after 'caf' is not UTF-8"),
        ("x.csv", b"text,caf\xe9\nx,1\n", "line 1, column 'caf?': byte 0xe9"),
        ("x.csv", b'text,a\nx,1\n"one\ncaf\xe9",1\n', "line 4, column 'text': byte 0xe9"),
        ("x.csv", b"text,a\nx,1\nnul\0,1\n", "line 3, column 'text': a NUL character"),
        ("x.csv", "text,a\nx,1\n".encode("utf-16"), "line 1: the text is UTF-16"),
        ("x.csv", b"PK\x03\x04....", "is not a text file (a zip"),
        ("x.tsv", b"text\ta\nx, y\t1\nz\n", "line 3: 1 field where the header has 2: put a text that holds a tab"),
        ("x.jsonl", b"", "x.jsonl: the file is empty"),
        ("x.jsonl", b"\n \r\n", "x.jsonl: the file has no records"),
        ("x.jsonl", b'{"text":"x","a":1}\n{"text":\n', "line 2: not valid JSON at character"),
        ("x.jsonl", b'[{"text":"x","a":1}]\n', "line 1: an object is expected, a list was found"),
        ("x.jsonl", b'{"text":"x","a":1}\n"x"\n', "line 2: an object is expected, a string was found"),
        ("x.jsonl", b'{"text":"x","a":1}\n{"a":1}\n', "line 2, column 'text': the record has no such key"),
        ("x.jsonl", b'{"text":"x","a":1}\n{"text":null,"a":1}\n', "line 2, column 'text': null is not a text"),
        ("x.jsonl", b'{"text":"x","a":1}\n{"text":5,"a":1}\n', "line 2, column 'text': 5 is not a text"),
        ("x.jsonl", b'{"text":"x","a":1}\n{"text":"y"}\n', "line 2, column 'a': the record has no such key"),
        ("x.jsonl", b'{"text":"x","a":1}\n{"text":"y","a":0,"b":1}\n', "line 2, column 'b': the first record has no"),
        ("x.jsonl", b'{"text":"x","a":1}\n{"text":"y","a":0,"a":1}\n', "line 2, column 'a': 'a' occurs twice"),
        ("x.jsonl", b'{"id":1,"text":"x","a":1}\n{"text":"y","a":0}\n', "line 2, column 'id': no id, and the first"),
        ("x.jsonl", b'{"text":"x","a":1}\n{"id":1,"text":"y","a":0}\n', "line 2, column 'id': an id, and the first"),
        ("x.jsonl", b'{"text":"x","a":1}\n{"text":"caf\xe9","a":0}\n', "line 2: byte 0xe9"),
        ("x.jsonl", b'{"text":"x","a":1}\n{"text":"a\\u0000b","a":0}\n', "line 2, column 'text': a NUL character"),
        ("x.jsonl", b'{"text":"x","a":1}\n{"text":"\\ud83d","a":0}\n', "column 'text': \\ud83d is half of a surrogate"),
        ("x.jsonl", b'{"text":"x","a":1}\n' + b"[" * 100_000, "line 2: "),
        ("x.xlsx", b"text,a\nx,1\n", "'.xlsx' is not a known format: use .csv, .tsv, .jsonl"),
    ],
)
def test_a_faulty_file_is_refused_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_dataset(path)
    assert str(caught.value).startswith(str(path))


def test_no_file_and_no_permission_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.csv: no such file"):
        read_dataset(tmp_path / "x.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match=r"folder\.csv: is a folder"):
        read_dataset(tmp_path / "folder.csv")
    with pytest.raises(InputError, match=r"x\.csv: cannot be read"):
        file_fingerprint(tmp_path / "x.csv")


def test_a_parquet_file_gives_the_same_as_its_csv(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    plain = read_dataset(CASES / "D05_int_twin.csv")
    assert plain.labels is not None
    columns: dict[str, object] = {"text": plain.texts}
    kinds = [pyarrow.int8(), pyarrow.float64(), pyarrow.bool_(), pyarrow.string(), pyarrow.int64()] * 2
    for name, column, kind in zip(plain.label_names, plain.labels.T.tolist(), kinds, strict=False):
        columns[name] = pyarrow.array(column).cast(kind)
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    read = read_dataset(tmp_path / "x.parquet")
    assert (read.texts, read.label_names, read.columns) == (plain.texts, plain.label_names, plain.columns)
    assert np.array_equal(read.labels, plain.labels)

    table = pyarrow.table({"text": ["x"], "a": [1], "__index_level_0__": [7]})  # as pandas writes its index
    parquet.write_table(table, tmp_path / "x.parquet")
    assert read_dataset(tmp_path / "x.parquet").label_names == ("a",)

    table = pyarrow.table({"text": ["x", None, "z"], "a": [1, 0, 2]})
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x.parquet, row 2, column 'text': null is not a text.*1 more problem:"):
        read_dataset(tmp_path / "x.parquet")


def test_a_cut_parquet_file_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"text": ["x"] * 1000}), tmp_path / "x.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    for content in (whole[: len(whole) * 6 // 10], b"text,a\nx,1\n"):
        with pytest.raises(InputError, match=r"x\.parquet: is not a readable Parquet file"):
            read_texts(write(tmp_path / "x.parquet", content))


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"emodistill\[parquet\]"):
        read_texts(write(tmp_path / "x.parquet", b"PAR1"))
    with (
        pytest.raises(MissingExtraError, match=r"emodistill\[parquet\]"),
        open_predictions(tmp_path / "out.parquet", ["a"]),
    ):
        pass
    assert not (tmp_path / "out.parquet").exists()


# Streams.


def test_a_late_fault_is_found_before_the_first_chunk(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", '{"text": "x"}\n' * 5000 + "{}\n")
    with pytest.raises(InputError, match="line 5001, column 'text'"):
        iter_text_records(path)
    chunks = iter_text_records(path, chunk_rows=100, check_first=False)
    assert len(next(chunks)) == 100
    with pytest.raises(InputError, match="line 5001, column 'text'"):
        list(chunks)


def test_a_stream_reads_no_further_than_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.csv", "text\n" + "x\n" * 200_000)
    n_read = 0
    lines = formats._Lines.__iter__

    def counted(self: formats._Lines) -> object:
        nonlocal n_read
        for line in lines(self):
            n_read += 1
            yield line

    monkeypatch.setattr(formats._Lines, "__iter__", counted)
    next(iter_text_records(path, chunk_rows=10, check_first=False))
    assert n_read == 11


def test_chunk_rows_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="chunk_rows is 0"):
        iter_text_records(CASES / "D13_order.csv", 0)


# Predictions.

PROBABILITIES = np.array([[0.25, 0.5], [0.1234567, 1.0]], dtype=np.float32)
DECISIONS = np.array([[0, 1], [0, 1]], dtype=np.int8)


def test_predictions_in_each_format(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", '{"id":7,"text":"a, b","who":["x"],"love":0}\n{"id":8,"text":"","who":null}')
    chunks = [([record], PROBABILITIES[[i]], DECISIONS[[i]]) for i, record in enumerate(records_of(path))]
    options = {"label_names": ["joy", "love"], "kept_columns": ["who"]}
    write_predictions(tmp_path / "deep" / "out.csv", chunks, **options)
    assert (tmp_path / "deep" / "out.csv").read_text() == (
        "id,text,who,joy,love,probability_joy,probability_love\n"
        '7,"a, b","[""x""]",0,1,0.250000,0.500000\n'
        '8,"","",0,1,0.123457,1.000000\n'
    )
    write_predictions(tmp_path / "out.jsonl", chunks, **options)
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first == {
        "id": 7,
        "text": "a, b",
        "who": ["x"],
        "labels": ["love"],
        "probabilities": {"joy": 0.25, "love": 0.5},
    }
    assert (second["id"], second["probabilities"]["joy"]) == (8, 0.123457)
    read_table = pytest.importorskip("pyarrow.parquet").read_table
    write_predictions(tmp_path / "out.parquet", chunks, **options)
    assert read_table(tmp_path / "out.parquet").to_pydict() == {
        "id": ["7", "8"],
        "text": ["a, b", ""],
        "who": ['["x"]', ""],
        "joy": [0, 0],
        "love": [1, 1],
        "probability_joy": PROBABILITIES[:, 0].tolist(),
        "probability_love": PROBABILITIES[:, 1].tolist(),
    }


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_stopped_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    out = write(tmp_path / f"out.{suffix}", "old")
    records = records_of(CASES / "D02_plain_twin.csv")[:2]
    with pytest.raises(KeyboardInterrupt), open_predictions(out, ["a", "b"]) as writer:  # noqa: PT012
        writer.write(records, PROBABILITIES, DECISIONS)
        raise KeyboardInterrupt
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_predictions_of_another_shape_or_name_are_refused(tmp_path: Path) -> None:
    records = records_of(CASES / "D02_plain_twin.csv")
    with pytest.raises(ConfigError, match=r"probabilities have the shape \(2, 2\), expected \(4, 2\)"):
        write_predictions(tmp_path / "out.csv", [(records, PROBABILITIES, DECISIONS)], ["a", "b"])
    with pytest.raises(ConfigError, match="the column 'love' cannot be kept"):
        write_predictions(tmp_path / "out.csv", [], ["love"], kept_columns=["love"])
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(ENCODABLE), min_size=1, max_size=8), st.sampled_from(SUFFIXES))
def test_any_text_survives_writing_and_reading(tmp_path: Path, texts: list[str], suffix: str) -> None:
    records = [data.Record(None, text, {"text": text}) for text in texts]
    ones = np.ones((len(texts), 1))
    write_predictions(tmp_path / f"out.{suffix}", [(records, ones, ones.astype(np.int8))], ["a"])
    assert read_texts(tmp_path / f"out.{suffix}").texts == texts
    assert [record.text for record in records_of(tmp_path / f"out.{suffix}", chunk_rows=3)] == texts


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(ENCODABLE), min_size=1, max_size=5))
def test_a_csv_line_is_what_the_standard_reader_reads(cells: list[str]) -> None:
    line = csv_line(cells)
    assert next(csv.reader(_physical_lines(line), strict=True)) == cells


def _physical_lines(text: str) -> list[str]:
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n|$)", text)[:-1]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80), suffix=st.sampled_from(["csv", "tsv", "jsonl"]))
@example(content=b'"', suffix="tsv")  # a fault before there is a header
def test_rubbish_gives_rows_or_an_input_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = write(tmp_path / f"x.{suffix}", (b"text,a\n" if suffix == "csv" else b"") + content)
    try:
        dataset = read_dataset(path, require_labels=False)
    except InputError:
        return
    assert dataset.n_rows > 0
    assert dataset.labels is None or dataset.labels.shape == (dataset.n_rows, len(dataset.label_names))


# Fingerprints.


def test_fingerprints_are_those_of_blake2b_and_sha256(tmp_path: Path) -> None:
    # blake2b(b"abc", digest_size=8) is d8bb14d833d59559 (b2sum -l 64); its first byte is the lowest.
    fingerprints = row_fingerprints(["abc", "", "café", "abc"])
    assert fingerprints.dtype == np.uint64
    assert fingerprints.shape == (4,)
    assert int(fingerprints[0]) == int.from_bytes(bytes.fromhex("d8bb14d833d59559"), "little")
    assert fingerprints[0] == fingerprints[3]
    assert len(set(fingerprints.tolist())) == 3
    # sha256 of "abc", FIPS 180-2, appendix B.1
    expected = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_fingerprint(write(tmp_path / "abc", "abc")) == expected


def test_exported_names_are_sorted_and_there() -> None:
    assert data.__all__ == sorted(data.__all__)
    assert all(hasattr(data, name) for name in data.__all__)
