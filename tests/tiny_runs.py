"""Runs that train in seconds: an encoder two layers wide with random weights, sentences whose words give the label."""

import csv
import shutil
import string
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures" / "encoders"
LABEL_NAMES = ("joy", "anger", "calm")
WORDS = {
    "joy": ("glad", "hooray", "smile", "yay"),
    "anger": ("mad", "furious", "grr", "rage"),
    "calm": ("quiet", "still", "rest", "ease"),
    "": ("the", "of", "door", "paper", "seven", "under", "car", "walk"),
}


def write_encoder(folder: Path) -> Path:
    """Copy the tiny random BERT of the fixtures and give it a vocabulary of single characters."""
    shutil.copytree(FIXTURES / "bert", folder)
    letters = string.ascii_lowercase
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), ".", "!", "'"]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    return folder


def write_rows(path: Path, n_rows: int, seed: int, *, with_labels: bool = True, placeholder: bool = False) -> Path:
    """Write sentences of three filler words and a telling word for each of their labels (none, one or two)."""
    generator = np.random.default_rng(seed)
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["text", *(LABEL_NAMES if with_labels else ())])
        for _ in range(n_rows):
            labels = generator.random(len(LABEL_NAMES)) < 0.35
            words = [*generator.choice(WORDS[""], 3)]
            words += [generator.choice(WORDS[name]) for name, given in zip(LABEL_NAMES, labels, strict=True) if given]
            generator.shuffle(words)
            values = [int(given and not placeholder) for given in labels] if with_labels else []
            writer.writerow([" ".join(words), *values])
    return path


def write_inputs(folder: Path, *, n_train: int = 60, epochs: int = 1) -> Path:
    """Write an encoder, four data files and the settings file of a run; return the settings file."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = write_encoder(folder / "encoder")
    write_rows(folder / "train.csv", n_train, 1)
    write_rows(folder / "dev.csv", 20, 2)
    write_rows(folder / "test.csv", 12, 3, placeholder=True)
    write_rows(folder / "unlabeled.csv", 10, 4, with_labels=False)
    (folder / "run.toml").write_text(
        f"""
        n_folds = 2
        [data]
        train = "train.csv"
        dev = "dev.csv"
        test = "test.csv"
        unlabeled = "unlabeled.csv"
        [[variants]]
        name = "bert"
        encoder = "{encoder}"
        epochs = {epochs}
        batch_size = 8
        learning_rate = 3e-3
        precision = "float32"
        [[variants]]
        name = "words"
        kind = "tfidf"
        [[students]]
        name = "tiny"
        encoder = "{encoder}"
        layers = [0]
        vocabulary_size = 60
        epochs = 1
        batch_size = 8
        precision = "float32"
        [bench]
        n_texts = 5
        n_repeats = 1
        """
    )
    return folder / "run.toml"
