"""Latency of one text at a time: from texts and models that answer them to medians and p95 in milliseconds.

One text per call and one thread, as in a service that answers people. Each round takes every model through all texts in
a new order, so that a model runs warm as it would in service, and a machine that slows down slows all models alike.
Calls that warm up do not count.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime
from tokenizers import Tokenizer

from emodistill.benchmarks.machine import describe_machine, machine_record
from emodistill.data import read_texts
from emodistill.runtime import Classifier
from emodistill.tokenization import encode, load_tokenizer

__all__ = [
    "BundleModel",
    "GraphModel",
    "Latency",
    "LatencyReport",
    "ModelChain",
    "TextModel",
    "measure_latency",
    "summarize_times",
    "time_interleaved",
]

N_REPEATS = 3
N_WARMUP = 50
NUMPY_DTYPES = {"tensor(int32)": np.int32, "tensor(int64)": np.int64, "tensor(float)": np.float32}


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Latency over all calls that count, in milliseconds.

    Attributes
    ----------
    p50_ms, p95_ms, mean_ms : float
        Median, 95th percentile and mean over texts and repeats.
    n_texts, n_repeats, n_warmup : int
        What was measured.
    """

    p50_ms: float
    p95_ms: float
    mean_ms: float
    n_texts: int
    n_repeats: int
    n_warmup: int


@dataclass(frozen=True, kw_only=True)
class LatencyReport:
    """A model's latency from text to answer, of the model without its tokenizer, and of the tokenizer alone."""

    with_tokenizing: Latency
    without_tokenizing: Latency
    tokenizing: Latency


class TextModel(Protocol):
    """What is measured: something that turns a text into model input, and model input into an answer."""

    def encode(self, text: str) -> Any:
        """Return the model's input for one text."""

    def run(self, encoded: Any) -> object:
        """Answer one encoded text."""

    def __call__(self, text: str) -> object:
        """Answer one text."""


class GraphModel:
    """An ONNX file and its tokenizer, one unpadded text per call.

    Parameters
    ----------
    graph_path : Path
        ONNX file with inputs `input_ids` and maybe `attention_mask`, `token_type_ids`, and an output `logits`.
    tokenizer : tokenizers.Tokenizer or Path
        Or the folder that holds it.
    max_length_tokens : int
        Longer texts are cut to this many tokens, [CLS] and [SEP] included.
    threads : int
        Threads inside a call.
    """

    def __init__(
        self, graph_path: Path, tokenizer: Tokenizer | Path, *, max_length_tokens: int, threads: int = 1
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(graph_path), options, providers=["CPUExecutionProvider"])
        self._dtypes = {item.name: NUMPY_DTYPES[item.type] for item in self._session.get_inputs()}
        self._tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, Path) else tokenizer
        self._max_length_tokens = max_length_tokens

    def encode(self, text: str) -> dict[str, npt.NDArray[Any]]:
        """Return what the session is fed for one text: ids, and a mask of ones where the graph asks for one."""
        (ids,) = encode(self._tokenizer, [text], self._max_length_tokens)
        rows = {
            name: ids if name == "input_ids" else np.full_like(ids, name == "attention_mask") for name in self._dtypes
        }
        return {name: row[np.newaxis].astype(self._dtypes[name]) for name, row in rows.items()}

    def run(self, encoded: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        """Return logits, float32 of shape (1, n_labels)."""
        logits: npt.NDArray[np.float32] = self._session.run(["logits"], encoded)[0]
        return logits

    def __call__(self, text: str) -> npt.NDArray[np.float32]:
        """Return the logits of a text."""
        return self.run(self.encode(text))


class BundleModel(GraphModel):
    """A graph of a bundle: answered through `Classifier`, as a user calls it; the graph alone for comparison.

    Parameters
    ----------
    bundle : Path or None
        None is the bundle that comes with the package.
    graph : str or None
        A name such as "model_fast"; None is the bundle's own choice.
    """

    def __init__(self, bundle: Path | None, *, graph: str | None = None) -> None:
        self.classifier = Classifier.load(bundle, graph=graph, threads=1)
        path = self.classifier.path
        super().__init__(path / self.classifier.graph_name, path, max_length_tokens=self.classifier.max_length_tokens)

    def __call__(self, text: str) -> npt.NDArray[np.float32]:
        """Return the probabilities of a text."""
        return self.classifier.predict_proba([text])


class ModelChain:
    """Several models that answer the same text one after the other: the members of an ensemble."""

    def __init__(self, models: Sequence[TextModel]) -> None:
        self._models = models

    def encode(self, text: str) -> list[Any]:
        """Return each model's own input."""
        return [model.encode(text) for model in self._models]

    def run(self, encoded: Sequence[Any]) -> list[object]:
        """Return each model's answer."""
        return [model.run(one) for model, one in zip(self._models, encoded, strict=True)]

    def __call__(self, text: str) -> list[object]:
        """Return each model's answer to a text."""
        return [model(text) for model in self._models]


def time_interleaved(
    calls: Mapping[str, Callable[[int], object]],
    n_items: int,
    *,
    n_repeats: int = N_REPEATS,
    n_warmup: int = N_WARMUP,
    seed: int = 0,
) -> dict[str, npt.NDArray[np.float64]]:
    """Time several callables on the same items, in rounds.

    Parameters
    ----------
    calls : mapping of str to callable
        Each takes the index of an item.
    n_items : int
        At least 1.
    n_repeats : int
        Rounds; in each, every callable goes through all items, in an order that all callables share.
    n_warmup : int
        Calls of each callable, in each round, before the clock counts.
    seed : int
        Of the orders of items and callables.

    Returns
    -------
    dict of str to float64 array of shape (n_repeats, n_items)
        Milliseconds, in the order of the items.
    """
    if n_items < 1:
        raise ValueError("there is nothing to time: give at least one text")
    generator = np.random.default_rng(seed)
    times = {name: np.empty((n_repeats, n_items)) for name in calls}
    for repeat in range(n_repeats):
        items = generator.permutation(n_items).tolist()
        for name in generator.permutation(list(calls)).tolist():
            call = calls[name]
            for count in range(n_warmup):
                call(items[count % n_items])
            for item in items:
                start = perf_counter_ns()
                call(item)
                times[name][repeat, item] = (perf_counter_ns() - start) / 1e6
    return times


def summarize_times(times_ms: npt.NDArray[np.float64], *, n_warmup: int) -> Latency:
    """Turn times of shape (n_repeats, n_items) into median, 95th percentile and mean over all calls.

    Examples
    --------
    >>> summarize_times(np.array([[1.0, 2.0, 6.0]]), n_warmup=0).p50_ms
    2.0
    """
    p50, p95 = np.percentile(times_ms, [50, 95])
    return Latency(
        p50_ms=round(float(p50), 4),
        p95_ms=round(float(p95), 4),
        mean_ms=round(float(times_ms.mean()), 4),
        n_texts=times_ms.shape[1],
        n_repeats=times_ms.shape[0],
        n_warmup=n_warmup,
    )


def measure_latency(
    models: Mapping[str, TextModel], texts: Sequence[str], *, n_repeats: int = N_REPEATS, n_warmup: int = N_WARMUP
) -> dict[str, LatencyReport]:
    """Measure models side by side, each from text to answer, without its tokenizer, and its tokenizer alone.

    Parameters
    ----------
    models : mapping of str to TextModel
        `BundleModel`, `GraphModel`, `ModelChain`, or anything with their three methods.
    texts : sequence of str
        Real texts: latency depends on their lengths.
    n_repeats, n_warmup : int
        See `time_interleaved`.

    Returns
    -------
    dict of str to LatencyReport
        In the order of `models`.
    """
    calls: dict[str, Callable[[int], object]] = {}
    for name, model in models.items():
        encoded = [model.encode(text) for text in texts]
        calls[f"with {name}"] = _on_items(model, texts)
        calls[f"without {name}"] = _on_items(model.run, encoded)
        calls[f"tokenizer {name}"] = _on_items(model.encode, texts)
    times = time_interleaved(calls, len(texts), n_repeats=n_repeats, n_warmup=n_warmup)
    summaries = {name: summarize_times(values, n_warmup=n_warmup) for name, values in times.items()}
    return {
        name: LatencyReport(
            with_tokenizing=summaries[f"with {name}"],
            without_tokenizing=summaries[f"without {name}"],
            tokenizing=summaries[f"tokenizer {name}"],
        )
        for name in models
    }


def _on_items(call: Callable[[Any], object], items: Sequence[Any]) -> Callable[[int], object]:
    return lambda index: call(items[index])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the latency of a bundle's graphs as a table, and as JSON on the last line."""
    parser = argparse.ArgumentParser(prog="python -m emodistill.benchmarks.latency", description=main.__doc__)
    parser.add_argument("--bundle", type=Path, help="bundle folder (default: the one that comes with the package)")
    parser.add_argument("--texts", type=Path, required=True, help="file with a text column")
    parser.add_argument("--graphs", nargs="+", default=[None], help="graphs of the bundle (default: its own choice)")
    parser.add_argument("--limit", type=int, default=500, help="texts at most")
    parser.add_argument("--repeats", type=int, default=N_REPEATS)
    parser.add_argument("--warmup", type=int, default=N_WARMUP)
    given = parser.parse_args(arguments)
    texts = read_texts(given.texts).texts[: given.limit]
    bundles = [BundleModel(given.bundle, graph=graph) for graph in given.graphs]
    models = {model.classifier.graph_name: model for model in bundles}
    reports = measure_latency(models, texts, n_repeats=given.repeats, n_warmup=given.warmup)
    machine = machine_record(threads=1)
    print(f"{'graph':32}{'p50 ms':>9}{'p95 ms':>9}{'graph alone':>13}{'tokenizer':>11}")
    for name, report in reports.items():
        whole = report.with_tokenizing
        alone, tokenizer = report.without_tokenizing.p50_ms, report.tokenizing.p50_ms
        print(f"{name:32}{whole.p50_ms:9.3f}{whole.p95_ms:9.3f}{alone:13.3f}{tokenizer:11.3f}")
    print(describe_machine(machine))
    print(json.dumps({"machine": machine, "graphs": {name: asdict(report) for name, report in reports.items()}}))


if __name__ == "__main__":
    main()
