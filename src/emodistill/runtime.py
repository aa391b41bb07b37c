"""Texts to label names, from a bundle folder, with numpy, onnxruntime and tokenizers alone.

A bundle holds one or more ONNX graphs of one model and, for each, its thresholds and calibration:

    logits -> probabilities = sigmoid(scale * logit + bias) -> a label is given where probability >= its threshold

Graphs that are not `batchable` (dynamic int8 picks one activation scale per call, so that neighbours would change the
answer) run one unpadded text per call, many calls side by side. The others run texts of equal length together: no
padding in any case, so that a text is computed the same way whatever stands beside it.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_errors
from tokenizers import Tokenizer

from emodistill.errors import ArtifactError, ConfigError, EncoderError, InputError
from emodistill.thresholds import decide, sigmoid
from emodistill.tokenization import encode, load_tokenizer

__all__ = ["DEFAULT_BUNDLE", "Classifier", "Scores", "usable_cores"]

DEFAULT_BUNDLE = Path(__file__).parent / "default_bundle"
BUNDLE_FORMAT = 1
SETTINGS_NAME = "emodistill.json"
N_ENCLOSING_TOKENS = 2  # [CLS] and [SEP], or <s> and </s>
TEXTS_PER_CHUNK = 4096  # tokenized at a time: bounds memory for long lists
TEXTS_PER_TASK = 32  # one text per call: handed to a thread at a time
TOKENS_PER_CALL = 1024  # several texts per call; more tokens per call were slower on 2 cores

_ID_DTYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
_MASK_DTYPES = _ID_DTYPES | {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bool)": np.bool_}
_LOAD_ERRORS = (
    onnxruntime_errors.Fail,
    onnxruntime_errors.InvalidArgument,
    onnxruntime_errors.InvalidGraph,
    onnxruntime_errors.InvalidProtobuf,
    onnxruntime_errors.NoSuchFile,
    onnxruntime_errors.NotImplemented,
    onnxruntime_errors.RuntimeException,
)

Float32Array = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a classifier found in some texts, one row per text, in the order of the texts.

    Attributes
    ----------
    logits : float32 array of shape (n_texts, n_labels)
        As the graph gave them, before calibration.
    probabilities : float32 array of shape (n_texts, n_labels), in [0, 1]
        Calibrated where the bundle has a calibration. Labels are independent: rows need not sum to 1.
    decisions : int8 array of shape (n_texts, n_labels)
        1 where the probability is at least the label's threshold.
    label_names : tuple of str
        Names of the columns.
    without_tokens : bool array of shape (n_texts,)
        Texts that held nothing to read: empty, blank, invisible characters.
    cut : bool array of shape (n_texts,)
        Texts longer than the model reads; their ends were ignored.
    """

    logits: Float32Array
    probabilities: Float32Array
    decisions: npt.NDArray[np.int8]
    label_names: tuple[str, ...]
    without_tokens: npt.NDArray[np.bool_]
    cut: npt.NDArray[np.bool_]

    @property
    def labels(self) -> list[list[str]]:
        """Names of the labels given to each text, in the model's order; empty where none was."""
        return [[name for name, yes in zip(self.label_names, row, strict=True) if yes] for row in self.decisions]


class Classifier:
    """A multi-label text classifier, ready to answer.

    Make one with `Classifier.load`. One classifier holds one ONNX Runtime session and may be shared by any number of
    threads. The same text gets the same answer in any company, order and number of threads: to the bit from graphs
    that run one text per call (the default one), to about 1e-6 from the others.

    Examples
    --------
    >>> from emodistill import Classifier
    >>> classifier = Classifier.load("runs/NAME/bundles/tiny")  # doctest: +SKIP
    >>> classifier.predict(["Thanks, I owe you one"])  # doctest: +SKIP
    [['gratitude']]
    """

    def __init__(self, bundle: "_Bundle", graph_name: str, threads: int) -> None:
        """Use `Classifier.load`."""
        graph = bundle.graphs[graph_name]
        self.path = bundle.folder
        self.graph_name = graph_name
        self.threads = threads
        self.label_names = bundle.label_names
        self.max_length_tokens = bundle.max_length_tokens
        self.batchable = graph.batchable
        self._thresholds = np.array(graph.thresholds, np.float32)
        self._scale = None if graph.calibration_scale is None else np.array(graph.calibration_scale, np.float64)
        self._bias = None if graph.calibration_bias is None else np.array(graph.calibration_bias, np.float64)
        self._tokenizer = bundle.load_tokenizer()
        # One text per call: a second thread inside a call of a millisecond costs more than it brings, so threads work
        # on different texts. Several texts per call: threads share the call.
        self._run = _GraphRunner(bundle.folder / graph_name, threads if graph.batchable else 1, len(self.label_names))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="emodistill") if threads > 1 else None

    @classmethod
    def load(
        cls, path: str | os.PathLike[str] | None = None, *, graph: str | None = None, threads: int | None = None
    ) -> Self:
        """Load a bundle folder.

        Parameters
        ----------
        path
            A folder that `emodistill export` wrote; by default the bundle that comes with the package.
        graph
            Which of the bundle's graphs: "onnx/model.onnx", or short "model"; by default the bundle's own choice.
        threads
            At least 1; by default as many as there are cores that this process may use (see `usable_cores`).

        Raises
        ------
        ArtifactError
            If the folder is no bundle, or a file of it is missing, damaged or of another format.
        ConfigError
            If the bundle has no such graph, or `threads` is below 1.
        """
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise ConfigError(f"threads is {threads!r}: give a whole number from 1 up, or leave it out")
        if path is None and not DEFAULT_BUNDLE.is_dir():
            raise ArtifactError(
                "this installation of emodistill came without a default model: give the path of a bundle folder"
            )
        bundle = _Bundle.read(DEFAULT_BUNDLE if path is None else Path(path))
        return cls(bundle, bundle.find_graph(graph), usable_cores() if threads is None else threads)

    @property
    def thresholds(self) -> Float32Array:
        """Thresholds of the labels, float32 of shape (n_labels,); a label is given where probability >= threshold."""
        return self._thresholds.copy()

    def predict(self, texts: Sequence[str]) -> list[list[str]]:
        """Name the labels of each text, in the model's order; none, one or several per text.

        Parameters
        ----------
        texts
            A list (or other sequence) of strings; a single string is refused, because it is a sequence of characters.

        Raises
        ------
        InputError
            If `texts` is a single string or holds something that is not a string.
        """
        return self.score(texts).labels

    def predict_proba(self, texts: Sequence[str]) -> Float32Array:
        """Return the probability of each label, float32 of shape (n_texts, n_labels); rows need not sum to 1."""
        return self._probabilities(self._logits(texts)[0])

    def predict_logits(self, texts: Sequence[str]) -> Float32Array:
        """Return the graph's logits before calibration, float32 of shape (n_texts, n_labels)."""
        return self._logits(texts)[0]

    def score(self, texts: Sequence[str]) -> Scores:
        """Return logits, probabilities and decisions, and which texts were empty or cut.

        Memory beyond the result does not grow with the number of texts.
        """
        logits, without_tokens, cut = self._logits(texts)
        probabilities = self._probabilities(logits)
        return Scores(
            logits=logits,
            probabilities=probabilities,
            decisions=decide(probabilities, self._thresholds),
            label_names=self.label_names,
            without_tokens=without_tokens,
            cut=cut,
        )

    def __repr__(self) -> str:
        return f"Classifier({str(self.path)!r}, graph={self.graph_name!r}, threads={self.threads})"

    def _logits(self, texts: Sequence[str]) -> tuple[Float32Array, Flags, Flags]:
        """Return logits, which texts were without tokens and which were cut."""
        texts = _checked_texts(texts)
        logits = np.empty((len(texts), len(self.label_names)), np.float32)
        without_tokens, cut = np.zeros(len(texts), np.bool_), np.zeros(len(texts), np.bool_)
        # Grouping costs a lone text, the most frequent call, several per cent of its time.
        score_chunk = self._score_together if self.batchable and len(texts) > 1 else self._score_singly
        for start in range(0, len(texts), TEXTS_PER_CHUNK):
            part = slice(start, start + TEXTS_PER_CHUNK)
            score_chunk(texts[part], logits[part], without_tokens[part], cut[part])
        return logits, without_tokens, cut

    def _probabilities(self, logits: Float32Array) -> Float32Array:
        if self._scale is None or self._bias is None:
            return sigmoid(logits)
        return sigmoid(self._scale * logits + self._bias)

    def _score_singly(self, texts: Sequence[str], logits: Float32Array, without_tokens: Flags, cut: Flags) -> None:
        """Fill the rows with one text per call, the calls spread over the threads."""

        def score_slice(start: int) -> None:
            for row in range(start, min(start + step, len(texts))):
                ids, cut[row] = self._encode(texts[row])
                without_tokens[row] = len(ids) == N_ENCLOSING_TOKENS
                logits[row] = self._run(ids[np.newaxis])[0]

        # Few texts are spread evenly, many in slices small enough that no thread waits long for the last one.
        step = max(1, min(TEXTS_PER_TASK, -(-len(texts) // self.threads)))
        starts = range(0, len(texts), step)
        if self._pool is None or len(starts) == 1:
            for start in starts:
                score_slice(start)
        else:
            list(self._pool.map(score_slice, starts))

    def _score_together(self, texts: Sequence[str], logits: Float32Array, without_tokens: Flags, cut: Flags) -> None:
        """Fill the rows with calls of several texts of equal length."""
        token_ids = []
        for row, text in enumerate(texts):
            ids, cut[row] = self._encode(text)
            without_tokens[row] = len(ids) == N_ENCLOSING_TOKENS
            token_ids.append(ids)
        for rows in _group_by_length(token_ids):
            logits[rows] = self._run(np.stack([token_ids[row] for row in rows]))

    def _encode(self, text: str) -> tuple[TokenIds, bool]:
        """Return the token ids of a text and whether its end was cut off."""
        ids = encode(self._tokenizer, [text], self.max_length_tokens)[0]
        if len(ids) < self.max_length_tokens:
            return ids, False
        # It may fit exactly: then it does not grow when given room for one token more.
        return ids, len(encode(self._tokenizer, [text], self.max_length_tokens + 1)[0]) > self.max_length_tokens


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use, at least 1.

    The smallest of: the cores of the machine, the process's affinity (``taskset``), and the CPU quota of its control
    group or any above it (containers), version 1 or 2, rounded down.

    Parameters
    ----------
    root
        Where ``proc`` and ``sys`` are found.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _cgroup_folders(root) if (quota := _cpu_quota(folder)) is not None]
    return max(1, int(min([cores, *quotas])))


def _cgroup_folders(root: Path) -> list[Path]:
    """List the folders of this process's CPU control groups, from its own up to the root of the hierarchy."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    mount = root / "sys/fs/cgroup"
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = mount
        elif "cpu" in controllers.split(","):
            top = next((mount / name for name in (controllers, "cpu") if (mount / name).is_dir()), mount / "cpu")
        else:
            continue
        # A container may see the host's path here and its own group at the top; folders that are absent do not count.
        own = top / path.lstrip("/")
        folders += [own, *(folder for folder in own.parents if folder.is_relative_to(top))]
    return folders


def _cpu_quota(folder: Path) -> float | None:
    """Return the cores that a control group may use, None without a limit."""
    try:
        if (folder / "cpu.max").is_file():  # version 2: "max 100000" or "150000 100000"
            quota, period = (folder / "cpu.max").read_text().split()[:2]
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _checked_texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str | bytes):
        raise InputError("texts is a single string: put it in a list, predict([text])")
    try:
        checked = list(texts)
    except TypeError:
        raise InputError(f"texts is a {type(texts).__name__}: give a list of strings") from None
    for i, text in enumerate(checked):
        if not isinstance(text, str):
            raise InputError(f"texts[{i}] is a {type(text).__name__}, not a string: convert or leave out such rows")
    return checked


def _group_by_length(token_ids: Sequence[TokenIds]) -> Iterator[list[int]]:
    """Yield groups of rows of equal length, each of at most TOKENS_PER_CALL tokens (or one row)."""
    lengths = np.array([len(ids) for ids in token_ids], np.int64)
    order = np.argsort(lengths, kind="stable")
    bounds = np.flatnonzero(np.diff(lengths[order])) + 1
    for same_length in np.split(order, bounds):
        if len(same_length):
            step = max(1, TOKENS_PER_CALL // int(lengths[same_length[0]]))
            for start in range(0, len(same_length), step):
                yield same_length[start : start + step].tolist()


class _GraphRunner:
    """An ONNX Runtime session that is fed exactly the inputs it declares."""

    def __init__(self, path: Path, intra_op_threads: int, n_labels: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = intra_op_threads
        options.inter_op_num_threads = 1
        # Spinning threads took most of the time on cores that others use too; memory patterns are kept per shape of
        # the input and never dropped, without being faster.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except _LOAD_ERRORS as error:
            reason = str(error).strip().splitlines()[0]
            raise ArtifactError(f"{path} cannot be loaded ({reason}): copy or export the bundle again") from error
        self._feeds = [(node.name, *_feed_kind(node, path)) for node in self._session.get_inputs()]
        if "input_ids" not in [name for name, _, _ in self._feeds]:
            raise ArtifactError(f"{path} has no input 'input_ids': export the bundle again")
        output = next((node for node in self._session.get_outputs() if node.name == "logits"), None)
        if output is None:
            raise ArtifactError(f"{path} has no output 'logits': export the bundle again")
        if isinstance(output.shape[-1], int) and output.shape[-1] != n_labels:
            raise ArtifactError(f"{path} gives {output.shape[-1]} logits where {SETTINGS_NAME} names {n_labels} labels")

    def __call__(self, token_ids: TokenIds) -> Float32Array:
        """Return logits of shape (batch, n_labels) for unpadded ids of shape (batch, sequence)."""
        feeds = {
            name: token_ids.astype(dtype, copy=False) if value is None else np.full(token_ids.shape, value, dtype)
            for name, dtype, value in self._feeds
        }
        logits: Float32Array = self._session.run(["logits"], feeds)[0]
        return logits


def _feed_kind(node: Any, path: Path) -> tuple[Any, int | None]:
    """Return the dtype of an input and the constant it is filled with, None for the token ids themselves."""
    values = {"input_ids": None, "attention_mask": 1, "token_type_ids": 0}
    if node.name not in values:
        raise ArtifactError(f"{path} wants an input '{node.name}', which is none of {', '.join(values)}")
    dtypes = _MASK_DTYPES if node.name == "attention_mask" else _ID_DTYPES
    if node.type not in dtypes:
        raise ArtifactError(f"{path} wants '{node.name}' as {node.type}, which is none of {', '.join(dtypes)}")
    if len(node.shape) != 2 or any(isinstance(size, int) for size in node.shape):
        raise ArtifactError(
            f"{path} takes '{node.name}' of shape {node.shape} only: export it with symbolic batch and sequence"
        )
    return dtypes[node.type], values[node.name]


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """What emodistill.json says of one graph."""

    thresholds: tuple[float, ...]
    calibration_scale: tuple[float, ...] | None
    calibration_bias: tuple[float, ...] | None
    batchable: bool


@dataclass(frozen=True, kw_only=True)
class _Bundle:
    """What emodistill.json says, checked."""

    folder: Path
    label_names: tuple[str, ...]
    max_length_tokens: int
    default_graph: str
    graphs: Mapping[str, _Graph]

    @classmethod
    def read(cls, folder: Path) -> Self:
        path = folder / SETTINGS_NAME
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            what = "is no bundle: it has no emodistill.json" if folder.is_dir() else "does not exist"
            raise ArtifactError(f"{folder} {what}; give a folder that  emodistill export  wrote") from error
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read ({error}): copy or export the bundle again") from error
        if not isinstance(settings, dict) or settings.get("format") != BUNDLE_FORMAT:
            found = settings.get("format") if isinstance(settings, dict) else None
            raise ArtifactError(
                f"{path} is of format {found!r}, this version of emodistill reads format {BUNDLE_FORMAT}: "
                "use the version that wrote it, or export again"
            )
        try:
            label_names = tuple(str(name) for name in settings["label_names"])
            return cls(
                folder=folder,
                label_names=label_names,
                max_length_tokens=int(settings["max_length_tokens"]),
                default_graph=settings["default_graph"],
                graphs={name: _read_graph(entry, len(label_names)) for name, entry in settings["graphs"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ArtifactError(f"{path} is damaged ({reason}): copy or export the bundle again") from error

    def find_graph(self, name: str | None) -> str:
        """Resolve "onnx/model_fast.onnx", "model_fast.onnx" or "model_fast"; None is the bundle's choice."""
        wanted = self.default_graph if name is None else name
        found = next((key for key in self.graphs if wanted in (key, Path(key).name, Path(key).stem)), None)
        if found is None:
            known = ", ".join(f"'{Path(key).stem}'" for key in self.graphs)
            raise ConfigError(f"{self.folder} has no graph '{wanted}': choose one of {known}")
        if not (self.folder / found).is_file():
            raise ArtifactError(f"{self.folder / found} is missing: copy or export the bundle again")
        return found

    def load_tokenizer(self) -> Tokenizer:
        try:
            return load_tokenizer(self.folder)
        except EncoderError as error:
            raise ArtifactError(f"the bundle's tokenizer cannot be used: {error}") from error


def _read_graph(entry: Mapping[str, Any], n_labels: int) -> _Graph:
    def per_label(key: str) -> tuple[float, ...]:
        values = tuple(float(value) for value in entry[key])
        if len(values) != n_labels or not np.isfinite(values).all():
            raise ValueError(f"{key} needs one finite number for each of the {n_labels} labels")
        return values

    calibrated = entry.get("calibration_scale") is not None
    if calibrated != (entry.get("calibration_bias") is not None):
        raise ValueError("of calibration_scale and calibration_bias only one is given")
    return _Graph(
        thresholds=per_label("thresholds"),
        calibration_scale=per_label("calibration_scale") if calibrated else None,
        calibration_bias=per_label("calibration_bias") if calibrated else None,
        batchable=bool(entry["batchable"]),
    )
