"""The submission: case D27, and equal bytes for equal decisions."""

import csv
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from emodistill.data import Dataset, read_dataset, read_texts, write_submission
from emodistill.errors import ConfigError, InputError

CASES = Path(__file__).parent / "cases"
SHARED = Path(os.environ.get("EMODISTILL_SHARED", Path(__file__).parents[2] / "shared"))


def rows_of(zip_path: Path) -> list[list[str]]:
    with zipfile.ZipFile(zip_path) as archive:
        assert archive.namelist() == ["submission.csv"]
        assert archive.testzip() is None
        assert archive.infolist()[0].date_time == (1980, 1, 1, 0, 0, 0)  # not the clock: equal decisions, equal bytes
        content = archive.read("submission.csv").decode("utf-8")
    return list(csv.reader(io.StringIO(content, newline=""), strict=True))


def decisions_for(dataset: Dataset, n_labels: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2, (dataset.n_rows, n_labels)).astype(np.int8)


def test_d27_one_file_at_the_top_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = read_dataset(CASES / "D03_quoted_newlines.csv")
    decisions = decisions_for(dataset)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    paths = [tmp_path / "absolute.zip", Path("with a space") / "sub mission.zip", Path("../relative.zip")]
    for path in paths:
        write_submission(path, dataset, decisions)
        write_submission(path, dataset, decisions)  # replaces, does not append
    assert len({path.read_bytes() for path in paths}) == 1
    assert [path.name for path in Path("with a space").iterdir()] == ["sub mission.zip"]
    header, *rows = rows_of(paths[0])
    assert header == list(dataset.columns)
    assert [row[0] for row in rows] == dataset.texts
    assert [[int(value) for value in row[1:]] for row in rows] == decisions.tolist()


def test_all_columns_stay_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_text("b,id,text,author,a\n0,7,hello,ann,0\n0,8,bye,,0\n")
    expected = [["b", "id", "text", "author", "a"], ["1", "7", "hello", "ann", "0"], ["1", "8", "bye", "", "1"]]
    decisions = np.array([[0, 1], [1, 1]])
    write_submission(tmp_path / "x.zip", read_dataset(path, label_names=["a", "b"]), decisions)
    assert rows_of(tmp_path / "x.zip") == expected
    write_submission(tmp_path / "x.zip", read_texts(path), decisions, label_names=["a", "b"])
    assert rows_of(tmp_path / "x.zip") == expected


def test_labels_without_a_column_or_a_value_are_filled_in(tmp_path: Path) -> None:
    decisions = np.array([[0, 1], [1, 1]])
    for content in ("text\nx\ny\n", "text,a,b\nx,,\ny,,\n"):
        (tmp_path / "test.csv").write_text(content)
        dataset = read_dataset(tmp_path / "test.csv", label_names=["a", "b"], require_labels=False)
        write_submission(tmp_path / "x.zip", dataset, decisions, label_names=["a", "b"])
        assert rows_of(tmp_path / "x.zip") == [["text", "a", "b"], ["x", "0", "1"], ["y", "1", "1"]]


def test_a_faulty_call_leaves_the_old_zip(tmp_path: Path) -> None:
    dataset = read_dataset(CASES / "D02_plain_twin.csv")
    write_submission(tmp_path / "x.zip", dataset, np.zeros((4, 7)))
    before = (tmp_path / "x.zip").read_bytes()
    with pytest.raises(ConfigError, match=r"shape \(4, 6\), expected \(4, 7\)"):
        write_submission(tmp_path / "x.zip", dataset, np.zeros((4, 6)))
    with pytest.raises(ConfigError, match="a value other than 0 and 1"):
        write_submission(tmp_path / "x.zip", dataset, np.full((4, 7), 0.7))
    assert (tmp_path / "x.zip").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]
    with pytest.raises(InputError, match="cannot be written"):
        write_submission(tmp_path / "x.zip" / "y.zip", dataset, np.zeros((4, 7)))


@pytest.mark.real_data
def test_a_submission_of_zeros_is_the_test_file_of_the_competition(tmp_path: Path) -> None:
    path = SHARED / "data" / "competition" / "test.csv"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    dataset = read_dataset(path)
    write_submission(tmp_path / "x.zip", dataset, np.zeros((3109, 7), dtype=np.int8))
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert archive.read("submission.csv") == path.read_bytes().replace(b"\r\n", b"\n")
