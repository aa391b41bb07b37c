"""The demo data set in `benchmarks/demo`: schema, sizes, label counts, and no wording shared between texts."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[1] / "benchmarks" / "demo"
LABELS = ("admiration", "amusement", "gratitude", "love", "pride", "relief", "remorse")
SIZES = {"train": 584, "dev": 190, "test": 75, "unlabeled": 120}
LABELLED = ("train", "dev")
SHARED_WORDS = 5


def read_rows(name: str) -> tuple[list[str], list[list[str]]]:
    with (DEMO / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    return header, rows


def read_texts(name: str) -> list[str]:
    return [row[0] for row in read_rows(name)[1]]


def read_labels(name: str) -> list[list[int]]:
    return [[int(value) for value in row[1:]] for row in read_rows(name)[1]]


def label_counts(name: str) -> list[int]:
    return [sum(column) for column in zip(*read_labels(name), strict=True)]


def split_words(text: str) -> list[str]:
    """Case-fold; drop apostrophes; every other character that is no letter or digit separates words."""
    return re.sub(r"[\W_]+", " ", re.sub(r"['’]", "", text.casefold())).split()


def find_shared_runs(texts: list[str], n_words: int = SHARED_WORDS) -> list[tuple[int, int, str]]:
    """Return (row, earlier row, run) for every run of `n_words` words that occurs in two rows."""
    first_row: dict[tuple[str, ...], int] = {}
    shared = []
    for row, text in enumerate(texts):
        words = split_words(text)
        for start in range(len(words) - n_words + 1):
            run = tuple(words[start : start + n_words])
            earlier = first_row.setdefault(run, row)
            if earlier != row:
                shared.append((row, earlier, " ".join(run)))
    return shared


@pytest.mark.parametrize(
    ("first", "second", "n_shared"),
    [
        ("I saw the old grey heron", "we SAW, the old... grey heron!", 1),  # case and punctuation do not hide it
        ("don't you dare touch my cake", "Don’t you-dare touch my soup", 1),  # both apostrophes, hyphen as a gap
        ("I saw the old grey heron", "I saw the old heron", 0),  # four words in a row are allowed
        ("one two three four five six", "one two three four five six", 2),  # runs 1-5 and 2-6
        ("no no no no no no", "yes", 0),  # a text that repeats itself shares nothing with another
    ],
)
def test_shared_runs_are_found(first: str, second: str, n_shared: int) -> None:
    assert len(find_shared_runs([first, second])) == n_shared


def test_no_two_texts_share_five_words_in_a_row() -> None:
    assert find_shared_runs([text for name in SIZES for text in read_texts(name)]) == []


def test_no_text_occurs_twice() -> None:
    keys = [" ".join(split_words(text)) for name in SIZES for text in read_texts(name)]
    assert len(set(keys)) == len(keys) == 969  # 584 + 190 + 75 + 120


@pytest.mark.parametrize("name", SIZES)
def test_schema_and_size(name: str) -> None:
    header, rows = read_rows(name)
    assert header == ["text"] if name == "unlabeled" else header == ["text", *LABELS]
    assert len(rows) == SIZES[name]
    for row in rows:
        assert len(row) == len(header)
        assert row[0] == row[0].strip()
        assert 5 <= len(row[0].split()) <= 40, row[0]
        assert set(row[1:]) <= {"0", "1"}


def test_files_are_utf8_with_plain_line_ends() -> None:
    for name in SIZES:
        content = (DEMO / f"{name}.csv").read_bytes()
        assert content.decode("utf-8").endswith("\n")
        assert b"\r" not in content
        assert not content.startswith(b"\xef\xbb\xbf")


def test_test_labels_are_placeholders() -> None:
    assert label_counts("test") == [0] * 7


def test_rare_labels_are_rare_but_present() -> None:
    counts = {name: dict(zip(LABELS, label_counts(name), strict=True)) for name in LABELLED}
    for name in LABELLED:
        common = min(counts[name][label] for label in ("admiration", "amusement", "gratitude", "love"))
        assert max(counts[name][label] for label in ("pride", "relief", "remorse")) <= 0.6 * common
    total = {label: counts["train"][label] + counts["dev"][label] for label in LABELS}
    assert total["pride"] >= 25
    assert total["relief"] >= 30
    assert total["remorse"] >= 40


def test_splits_are_stratified() -> None:
    # Positives per row of dev within 10 % of train's share or one row, whichever is larger.
    for n_train, n_dev in zip(label_counts("train"), label_counts("dev"), strict=True):
        expected = n_train * SIZES["dev"] / SIZES["train"]
        assert abs(n_dev - expected) <= max(1.0, 0.1 * expected)


@pytest.mark.parametrize("name", LABELLED)
def test_shares_of_rows_with_no_and_with_several_labels(name: str) -> None:
    per_row = [sum(labels) for labels in read_labels(name)]
    assert 0.30 <= per_row.count(0) / len(per_row) <= 0.38
    assert 0.12 <= sum(n > 1 for n in per_row) / len(per_row) <= 0.18


def test_data_card_states_the_counts_of_the_files() -> None:
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    for name in LABELLED:
        per_row = [sum(labels) for labels in read_labels(name)]
        cells = [name, SIZES[name], *label_counts(name), per_row.count(0), sum(n > 1 for n in per_row)]
        assert f"| {' | '.join(map(str, cells))} |" in card
