"""A run folder: where its pieces lie, which files it was made from, and what names their state.

`run.json` remembers the settings, the versions and the data files with their fingerprints, so that each stage can be
called again with the folder alone. A stage's fingerprint covers its settings and its inputs, and through them those of
the stages before it: what changes makes the pieces that depend on it stale, and no others.
"""

import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import emodistill
from emodistill.artifacts import fingerprint, part_folder, publish_piece, read_json, write_json, writing_beside
from emodistill.cli.settings import RunSettings
from emodistill.data import Dataset, file_fingerprint, read_dataset, read_texts, row_fingerprints
from emodistill.errors import ArtifactError, ConfigError, InputError
from emodistill.logits import EVALUATION_NAMES

__all__ = ["DataPaths", "RunData", "RunFolder"]

RUN_FILE_NAME = "run.json"
RUN_FORMAT = 1
RECORDED_PACKAGES = (
    "numpy", "onnx", "onnxruntime", "scikit-learn", "scipy", "tensorflow", "tensorflow-model-optimization",
    "tf-keras", "tf2onnx", "tokenizers", "transformers",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataPaths:
    """The files of a run; only train is needed."""

    train: Path
    dev: Path | None = None
    test: Path | None = None
    unlabeled: Path | None = None

    def items(self) -> Iterator[tuple[str, Path]]:
        """Yield name and path of the files that are given."""
        for name in ("train", *EVALUATION_NAMES):
            path = getattr(self, name)
            if path is not None:
                yield name, path


@dataclass(frozen=True)
class RunData:
    """The rows of a run, read once.

    Attributes
    ----------
    label_names : tuple of str
        From the header of train, in its order; every artefact keeps it.
    train_texts : list of str
    train_labels : int8 array of shape (n_train, n_labels)
        With `use_dev`, train and then dev.
    evaluation_texts : dict of str to list of str
        Any of "dev", "test", "unlabeled"; no "dev" with `use_dev`.
    dev_labels : int8 array of shape (n_dev, n_labels) or None
        Only ever scored.
    test : Dataset or None
        For the submission; its label columns are placeholders and are not read.
    ids : dict of str to list of str
        The column `id` of "train" and "unlabeled", where their files have one.
    """

    label_names: tuple[str, ...]
    train_texts: list[str]
    train_labels: NDArray[np.int8]
    evaluation_texts: dict[str, list[str]]
    dev_labels: NDArray[np.int8] | None
    test: Dataset | None
    ids: dict[str, list[str]]

    @classmethod
    def read(cls, paths: DataPaths, *, use_dev: bool) -> Self:
        """Read the files of a run.

        Raises
        ------
        InputError
            If a file cannot be used, or its labels are not those of train.
        """
        train = read_dataset(paths.train)
        names = train.label_names
        if not names:
            raise InputError(f"{paths.train} has no label columns: add one 0/1 column per label beside 'text'")
        assert train.labels is not None
        texts, labels, ids = list(train.texts), train.labels, train.ids
        dev = None if paths.dev is None else read_dataset(paths.dev, label_names=names)
        test = None if paths.test is None else read_dataset(paths.test, label_names=names, require_labels=False)
        unlabeled = None if paths.unlabeled is None else read_texts(paths.unlabeled)
        if use_dev:
            if dev is None or dev.labels is None:
                raise ConfigError("use_dev needs the labelled dev file: add --dev FILE")
            ids = None if ids is None or dev.ids is None else ids + dev.ids
            texts, labels, dev = texts + list(dev.texts), np.concatenate([labels, dev.labels]), None
        given = {"dev": dev, "test": test, "unlabeled": unlabeled}
        return cls(
            label_names=names,
            train_texts=texts,
            train_labels=labels.astype(np.int8),
            evaluation_texts={name: list(file.texts) for name, file in given.items() if file is not None},
            dev_labels=None if dev is None else dev.labels,
            test=test,
            ids={
                name: values
                for name, values in (("train", ids), ("unlabeled", None if unlabeled is None else unlabeled.ids))
                if values is not None
            },
        )

    @cached_property
    def train_rows(self) -> NDArray[np.uint64]:
        """Row fingerprints of the train texts."""
        return row_fingerprints(self.train_texts)

    @cached_property
    def rows(self) -> dict[str, NDArray[np.uint64]]:
        """Row fingerprints of the evaluation texts, by file."""
        return {name: row_fingerprints(texts) for name, texts in self.evaluation_texts.items()}

    @cached_property
    def train_fingerprint(self) -> str:
        """Fingerprint of the train texts and labels."""
        return fingerprint(list(self.label_names), self.train_rows, self.train_labels)

    @cached_property
    def rows_fingerprint(self) -> str:
        """Fingerprint of the evaluation texts."""
        return fingerprint({name: fingerprint(values) for name, values in self.rows.items()})


class RunFolder:
    """A run: its folder, settings, data files and what was recorded about them.

    Use `RunFolder.create` to begin or change a run and `RunFolder.open` to go on with one.

    Attributes
    ----------
    path : Path
    settings : RunSettings
    paths : DataPaths
    """

    def __init__(self, path: Path, settings: RunSettings, paths: DataPaths, record: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings
        self.paths = paths
        self._record = record

    # ------------------------------------------------------------ making and finding

    @classmethod
    def create(cls, path: Path, settings: RunSettings, paths: DataPaths, *, reuse: list[Path] | None = None) -> Self:
        """Begin a run, or give an existing one other settings or files; nothing is written yet."""
        for name, file in paths.items():
            if not file.is_file():
                raise InputError(f"--{name} {file} does not exist: give the path of the {name} file")
        old = read_json(path / RUN_FILE_NAME) if (path / RUN_FILE_NAME).is_file() else {}
        if not old and path.is_dir() and any(entry.name != ".lock" for entry in path.iterdir()):
            raise ArtifactError(f"{path} is not empty and is no run folder: give another folder")
        record = {
            "format": RUN_FORMAT,
            "emodistill": emodistill.__version__,
            "settings": settings.to_dict(),
            "data": {
                name: {"path": str(file.resolve()), "fingerprint": file_fingerprint(file)}
                for name, file in paths.items()
            },
            "teacher": old.get("teacher"),
            "reuse": [str(folder.resolve()) for folder in reuse] if reuse else old.get("reuse", []),
            "seconds": old.get("seconds", {}),
            "seconds_of_attempts": old.get("seconds_of_attempts", {}),
        }
        return cls(path, settings, paths, record)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Find a run by its folder.

        Raises
        ------
        ArtifactError
            If the folder is no run folder, or a data file is gone or has changed since the run read it.
        """
        run = cls.remembered(path)
        for name, entry in run.data_record.items():
            file = Path(entry["path"])
            if not file.is_file():
                raise ArtifactError(
                    f"the {name} file {file} of this run is gone: put it back, "
                    f"or give its new place with  emodistill run --out {path} --{name} FILE ..."
                )
            if file_fingerprint(file) != entry["fingerprint"]:
                raise ArtifactError(
                    f"the {name} file {file} has changed since this run read it: restore it, or accept the new rows "
                    f"with  emodistill run --out {path} --{name} {file} ...  (what depends on it is made again)"
                )
        return run

    @classmethod
    def remembered(cls, path: Path) -> Self:
        """Read what run.json remembers, without looking at the data files.

        Raises
        ------
        ArtifactError
            If the folder is no run folder, or of another format.
        """
        if not cls.exists(path):
            raise ArtifactError(f"{path} is no run folder (it has no {RUN_FILE_NAME}): begin with 'emodistill run'")
        record = read_json(path / RUN_FILE_NAME)
        if record.get("format") != RUN_FORMAT:
            raise ArtifactError(
                f"{path / RUN_FILE_NAME} has format {record.get('format')}, this version reads {RUN_FORMAT}: "
                "use the version that wrote it, or begin another run"
            )
        paths = DataPaths(**{name: Path(entry["path"]) for name, entry in record["data"].items()})
        return cls(path, RunSettings.from_dict(record["settings"]), paths, record)

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether a run was begun in this folder."""
        return (path / RUN_FILE_NAME).is_file()

    def save(self) -> None:
        """Write run.json."""
        self._record["versions"] = _versions()
        write_json(self.path / RUN_FILE_NAME, self._record)

    # ------------------------------------------------------------ contents

    @cached_property
    def data(self) -> RunData:
        """The rows of the run; read on first use."""
        return RunData.read(self.paths, use_dev=self.settings.use_dev)

    @cached_property
    def fold_ids(self) -> NDArray[np.int8]:
        """Fold of each train row, int8 of shape (n_train,); the same for the same rows, labels and seed."""
        from emodistill.folds import assign_folds

        expected = fingerprint("folds", self.data.train_fingerprint, self.settings.n_folds, self.settings.seed)
        path = self.path / "folds.npz"
        if path.is_file():
            try:
                with np.load(path, allow_pickle=False) as saved:
                    if str(saved["fingerprint"]) == expected:
                        return np.asarray(saved["fold_ids"], dtype=np.int8)
            except (ValueError, KeyError, OSError, EOFError):
                pass  # damaged or older: it takes seconds to make again
        fold_ids = assign_folds(
            self.data.train_texts, self.data.train_labels, self.settings.n_folds, self.settings.seed
        )
        if self.path.is_dir():
            with writing_beside(path) as beside, beside.open("wb") as handle:
                np.savez_compressed(handle, fold_ids=fold_ids, fingerprint=np.array(expected))
        return np.asarray(fold_ids, dtype=np.int8)

    @property
    def reuse_folders(self) -> list[Path]:
        """Results or run folders whose members may stand for this run's."""
        return [Path(folder) for folder in self._record["reuse"]]

    @property
    def teacher_file(self) -> tuple[Path, str | None] | None:
        """The file that teaches the students in place of the ensemble, and the scale of its numbers."""
        entry = self._record.get("teacher")
        return None if entry is None else (Path(entry["path"]), entry["scale"])

    @teacher_file.setter
    def teacher_file(self, value: tuple[Path, str | None] | None) -> None:
        self._record["teacher"] = value and {"path": str(value[0].resolve()), "scale": value[1]}

    @property
    def data_record(self) -> Mapping[str, Any]:
        """Path and fingerprint of each data file."""
        data: Mapping[str, Any] = self._record["data"]
        return data

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of Python and of the libraries that last wrote here."""
        versions: Mapping[str, str] = self._record.get("versions", {})
        return versions

    @property
    def seconds(self) -> Mapping[str, float]:
        """How long each piece took to make, by its name."""
        seconds: Mapping[str, float] = self._record["seconds"]
        return seconds

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Record how long a piece takes; the times of interrupted attempts are added up."""
        started_s = time.monotonic()
        earlier: dict[str, float] = self._record.setdefault("seconds_of_attempts", {})
        before_s = earlier.get(name, 0.0)
        try:
            yield
        except BaseException:
            earlier[name] = round(before_s + time.monotonic() - started_s, 1)
            self.save()
            raise
        earlier.pop(name, None)
        self._record["seconds"][name] = round(before_s + time.monotonic() - started_s, 1)
        self.save()

    @staticmethod
    def publish(folder: Path, fingerprint: str, description: Any = None) -> None:
        """End mark a piece and rename it into place.

        The checkpoint that a killed run would have gone on from is not part of the piece.
        """
        for checkpoint in part_folder(folder).glob("checkpoint.*"):
            checkpoint.unlink()
        publish_piece(folder, fingerprint, description=description)

    # ------------------------------------------------------------ places

    def member_folder(self, variant: str, fold: int) -> Path:
        """Folder of one member."""
        return self.path / "members" / f"{variant}-fold{fold}"

    def embeddings_folder(self, name: str) -> Path:
        """Folder of all texts as one frozen encoder embeds them; variants of kind "head" share it."""
        return self.path / "embeddings" / name

    @property
    def ensemble_folder(self) -> Path:
        """Folder of the combined ensemble."""
        return self.path / "ensemble"

    def student_folder(self, student: str) -> Path:
        """Folder of one student's checkpoint."""
        return self.path / "students" / student

    def bundle_folder(self, student: str) -> Path:
        """Folder of one student's bundle."""
        return self.path / "bundles" / student

    @property
    def submissions_folder(self) -> Path:
        """Folder of the submissions, one per model."""
        return self.path / "submissions"

    @property
    def logits_folder(self) -> Path:
        """Folder of the saved logits, one file per model."""
        return self.path / "logits"

    @property
    def report_folder(self) -> Path:
        """Folder of the report."""
        return self.path / "report"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "emodistill": emodistill.__version__, "platform": sys.platform}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
