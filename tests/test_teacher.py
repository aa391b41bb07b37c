"""Teachers' files: what is read from each format, and what is refused with which sentence."""

import json
from pathlib import Path

import numpy as np
import pytest

from emodistill.errors import InputError
from emodistill.teacher import read_teacher_logits

LABELS = ("joy", "anger")
LOGITS = np.array([[2.5, -3.0], [-1.25, 0.5], [4.0, 1.0]], np.float32)


def write(path: Path, key: str = "id", names: tuple[str, ...] = ("a", "b", "c")) -> Path:
    """Write the logits with the labels in the other order and one column more."""
    if path.suffix == ".npz":
        np.savez(path, logits=LOGITS[:, ::-1], label_names=np.array(LABELS[::-1]), **{f"{key}s": np.array(names)})
    elif path.suffix == ".jsonl":
        rows = [{key: n, "anger": float(b), "joy": float(a)} for n, (a, b) in zip(names, LOGITS, strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        columns = {"anger": LOGITS[:, 1], key: list(names), "joy": LOGITS[:, 0].astype(np.float64)}
        parquet.write_table(pyarrow.table(columns), path)
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [separator.join(("anger", "more", key, "joy"))]
        lines += [separator.join((str(b), "x", n, str(a))) for n, (a, b) in zip(names, LOGITS, strict=True)]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".npz"])
@pytest.mark.parametrize("key", ["id", "text"])
def test_every_format_gives_the_same_numbers(tmp_path: Path, suffix: str, key: str) -> None:
    teacher = read_teacher_logits(write(tmp_path / f"t{suffix}", key), LABELS)
    assert teacher.key == key
    known, logits = teacher.of(["c", "nobody", "a", "a"])
    assert known.tolist() == [True, False, True, True]
    np.testing.assert_allclose(logits, LOGITS[[2, 0, 0]])
    assert logits.dtype == np.float32


def test_probabilities_become_finite_logits(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("id,joy,anger\na,0,1\nb,0.5,0.25\n")
    with pytest.raises(InputError, match=r"all numbers lie between 0 and 1.*--teacher-scale probabilities"):
        read_teacher_logits(path, LABELS)
    logits = read_teacher_logits(path, LABELS, scale="probabilities").logits
    np.testing.assert_allclose(logits, [[-13.8155, 13.8155], [0.0, np.log(1 / 3)]], rtol=1e-4)
    assert read_teacher_logits(path, LABELS, scale="logits").logits[1].tolist() == [0.5, 0.25]
    with pytest.raises(InputError, match="are no probabilities: leave --teacher-scale out"):
        read_teacher_logits(write(tmp_path / "t.csv"), LABELS, scale="probabilities")


def test_the_same_row_twice_is_fine_and_a_contradiction_is_not(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text,joy,anger\nhi,2,-3\nhi,2,-3\n")
    assert len(read_teacher_logits(path, LABELS).rows) == 1
    path.write_text("text,joy,anger\nhi,2,-3\nho,2,-3\nhi,2,-2\n")
    with pytest.raises(InputError, match=r"text 'hi' comes twice with different numbers \(rows 1 and 3\)"):
        read_teacher_logits(path, LABELS)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("id,joy\na,2\n", "there is no column 'anger': one per label of the run is needed"),
        ("joy,anger\n2,3\n", "there is no column 'id' or 'text'"),
        ("id,joy,anger\na,2,-3\nb,nan,1\n", "line 3, column 'joy': 'nan' is no finite number"),
        ("id,joy,anger\na,2,-3\nb,,1\n", "line 3, column 'joy': nothing is no finite number"),
        ("id,joy,anger\na,2,many\n", "line 2, column 'anger': 'many' is no finite number"),
        ("id,joy,anger\n,2,3\n", "line 2: the id is missing"),
        ("id,joy,anger\n", "there are no rows"),
    ],
)
def test_a_faulty_table_is_refused_with_its_place(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    with pytest.raises(InputError) as refused:
        read_teacher_logits(path, LABELS)
    assert sentence in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"ids": ["a"]}, "holds ids; arrays 'logits' and 'ids'"),
        ({"ids": ["a"], "logits": np.zeros((2, 2))}, "'logits' is float64 of shape (2, 2)"),
        ({"ids": ["a"], "logits": np.ones((1, 1)), "label_names": ["joy"]}, "'label_names' lacks 'anger'"),
        ({"ids": ["a", "b"], "logits": [[1.0, 2.0], [3.0, np.inf]]}, "row 2 (id 'b'), label 'anger': inf"),
        ({"ids": [], "logits": np.zeros((0, 2))}, "there are no rows"),
    ],
)
def test_a_faulty_npz_is_refused(tmp_path: Path, arrays: dict[str, object], sentence: str) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, **{name: np.array(value) for name, value in arrays.items()})
    with pytest.raises(InputError) as refused:
        read_teacher_logits(path, LABELS)
    assert sentence in str(refused.value)


def test_what_is_no_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    with pytest.raises(InputError, match="no such file"):
        read_teacher_logits(path, LABELS)
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(InputError, match="cannot be read as npz"):
        read_teacher_logits(path, LABELS)
    np.savez(path, ids=np.array([{}], object), logits=np.zeros((1, 2)))
    with pytest.raises(InputError, match="cannot be read as npz without pickle"):
        read_teacher_logits(path, LABELS)
