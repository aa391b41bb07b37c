"""The gate before a bundle is written: does an exported graph answer as the model it was made from?

Every graph is compared with Keras on held-out texts, one unpadded text per call, as it will be served: logits, changed
decisions, F1 with its interval. The neighbour test runs the same texts alone and together; it decides whether a graph
may be given several texts per call. Latency is measured beside the float graph. Integer graphs are checked for the
16-bit pair sums of processors without VNNI.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from emodistill.errors import VerificationError
from emodistill.export.quantization import INTEGER_PRODUCTS, integer_weights, largest_weight
from emodistill.metrics import bootstrap_interval, micro_f1, paired_bootstrap
from emodistill.thresholds import cross_fit, decide, search_shared_threshold, sigmoid

__all__ = [
    "PairSums",
    "Session",
    "VerificationLimits",
    "compare_on_cpu",
    "compare_with_reference",
    "judge",
    "measure_latency",
    "neighbour_test",
    "pair_sums",
    "saturation_report",
]

INT16_MAX = 32767
FEW_ROWS = 1000  # below this, one or two decisions move F1 by more than its limit
NEIGHBOURS = 32

Float32Array = NDArray[np.float32]
TokenIds = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class VerificationLimits:
    """What a graph may differ by before it is refused as a bundle's default.

    Parameters
    ----------
    float_logit_difference
        Largest difference of a float graph's logit to Keras.
    int8_mean_logit_difference, int8_max_logit_difference
        Mean and largest difference of an int8 graph's logits to Keras, in units of the logits' standard deviation.
    changed_decision_share
        Share of all (text, label) decisions that may change.
    micro_f1_loss
        Micro-F1 that may be lost against Keras; with fewer than 1,000 rows a larger loss is refused only if its
        paired interval excludes 0.
    neighbour_logit_difference
        Largest difference between a text's logits alone and in company for a graph to be called batchable.
    other_cpu_logit_difference
        Largest difference of a logit on an emulated processor, where that is measured.
    latency_ratio
        Largest ratio of an int8 graph's median latency to its float twin's.
    """

    float_logit_difference: float = 1e-3
    int8_mean_logit_difference: float = 0.1
    int8_max_logit_difference: float = 1.0
    changed_decision_share: float = 0.01
    micro_f1_loss: float = 0.003
    neighbour_logit_difference: float = 1e-3
    other_cpu_logit_difference: float = 0.02
    latency_ratio: float = 1.0


class Session:
    """An ONNX Runtime session on one core that is fed what it asks for."""

    def __init__(self, model: Path | onnx.ModelProto) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self._types = {x.name: np.int64 if x.type == "tensor(int64)" else np.int32 for x in self._session.get_inputs()}
        self.output_names = [x.name for x in self._session.get_outputs()]

    @property
    def has_mask(self) -> bool:
        """Whether texts of several lengths may share a call."""
        return "attention_mask" in self._types

    def feeds(self, ids: TokenIds, mask: TokenIds | None = None) -> dict[str, NDArray[Any]]:
        """Return the inputs for ids of shape (batch, sequence); without a mask all are real tokens."""
        values = {"input_ids": ids, "attention_mask": np.ones_like(ids) if mask is None else mask}
        return {name: values[name].astype(dtype) for name, dtype in self._types.items()}

    def run(self, names: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Return the named outputs."""
        outputs: list[NDArray[Any]] = self._session.run(list(names), dict(feeds))
        return outputs

    def logits(self, token_ids: Sequence[TokenIds]) -> Float32Array:
        """Return the logits of texts that are run one by one, unpadded: float32 (n_texts, n_labels)."""
        return np.concatenate([self.run(["logits"], self.feeds(row[None]))[0] for row in token_ids])


# ---------------------------------------------------------------- answers


def compare_with_reference(
    logits: Float32Array,
    reference_logits: Float32Array,
    *,
    y_true: NDArray[np.int8] | None,
    thresholds: Float32Array,
    reference_thresholds: Float32Array,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare a graph's logits with those of the model it was made from.

    Parameters
    ----------
    logits, reference_logits
        float32 arrays of shape (n_texts, n_labels).
    y_true
        int8 multi-hot array of the same shape; without it no F1 is reported.
    thresholds, reference_thresholds
        float32 arrays of shape (n_labels,) that each side decides with.
    seed
        Of the bootstrap and of the halves that thresholds are cross-fitted on.

    Returns
    -------
    dict
        Differences, changed decisions and, with labels, micro-F1. A text's F1 decisions use a threshold that was
        searched on the other half of the texts, for both sides.
    """
    difference = np.abs(logits - reference_logits)
    changed = decide(sigmoid(logits), thresholds) != decide(sigmoid(reference_logits), reference_thresholds)
    report: dict[str, Any] = {
        "n_texts": len(logits),
        "max_logit_difference": float(difference.max()),
        "mean_logit_difference": float(difference.mean()),
        "logit_standard_deviation": float(reference_logits.std()),
        "changed_decisions": int(changed.sum()),
        "n_decisions": int(changed.size),
    }
    if y_true is None:
        return report
    halves = np.random.default_rng(seed).permutation(len(y_true)) % 2
    ours, theirs = (cross_fit(halves, y_true, sigmoid(x), search_shared_threshold) for x in (logits, reference_logits))
    paired = paired_bootstrap(y_true, ours, theirs, seed=seed)
    return report | {
        "micro_f1": micro_f1(y_true, ours),
        "micro_f1_interval": list(bootstrap_interval(y_true, ours, seed=seed)),
        "micro_f1_keras": micro_f1(y_true, theirs),
        "micro_f1_difference": paired.to_json(),
    }


def neighbour_test(
    session: Session, token_ids: Sequence[TokenIds], pad_token_id: int, thresholds: Float32Array
) -> dict[str, Any]:
    """Run the same texts alone and in company.

    A graph with a mask gets 32 texts of all lengths padded to the longest, in two orders, among them the shortest and
    the longest; one without gets 32 of equal length (texts are cut to the shortest of their group), in two orders.

    Returns
    -------
    dict
        ``max_logit_difference`` and ``changed_decisions`` over all comparisons.
    """
    by_length = sorted(token_ids, key=len)
    if session.has_mask:
        step = max(1, len(by_length) // (NEIGHBOURS - 2))
        groups = [[by_length[0], *by_length[::step][: NEIGHBOURS - 2], by_length[-1]], list(token_ids[:NEIGHBOURS])]
    else:
        starts = np.linspace(0, max(0, len(by_length) - NEIGHBOURS), 4).astype(int)
        groups = [_cut_to_shortest(by_length[start : start + NEIGHBOURS]) for start in starts]
    largest, changed, n_compared = 0.0, 0, 0
    for group in groups:
        alone = session.logits(group)
        for order in (np.arange(len(group)), np.arange(len(group))[::-1]):
            together = _run_together(session, [group[i] for i in order], pad_token_id)
            largest = max(largest, float(np.abs(together - alone[order]).max()))
            changed += int((decide(sigmoid(together), thresholds) != decide(sigmoid(alone[order]), thresholds)).sum())
            n_compared += len(group)
    return {
        "kind": "padded" if session.has_mask else "equal length",
        "n_compared": n_compared,
        "max_logit_difference": largest,
        "changed_decisions": changed,
    }


def _cut_to_shortest(rows: Sequence[TokenIds]) -> list[TokenIds]:
    shortest = min(len(row) for row in rows)
    return [np.append(row[: shortest - 1], row[-1]).astype(np.int32) for row in rows]


def _run_together(session: Session, rows: Sequence[TokenIds], pad_token_id: int) -> Float32Array:
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), pad_token_id, np.int32)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    logits: Float32Array = session.run(["logits"], session.feeds(ids, mask))[0]
    return logits


def measure_latency(
    sessions: Mapping[str, Session], token_ids: Sequence[TokenIds], *, n_repeats: int = 3
) -> dict[str, dict[str, float]]:
    """Time graphs side by side, one text per call on one core, tokenizing excluded.

    Returns
    -------
    dict
        ``{"p50_ms", "p95_ms"}`` by name: over texts, of the best of `n_repeats` calls each.
    """
    times = {name: np.full(len(token_ids), np.inf) for name in sessions}
    for repeat in range(n_repeats + 1):  # the first round warms up
        for i, row in enumerate(token_ids):
            for name, session in sessions.items():
                feeds = session.feeds(row[None])
                start = time.perf_counter()
                session.run(["logits"], feeds)
                elapsed = time.perf_counter() - start
                if repeat:
                    times[name][i] = min(times[name][i], elapsed)
    return {
        name: {"p50_ms": float(np.median(t) * 1e3), "p95_ms": float(np.percentile(t, 95) * 1e3)}
        for name, t in times.items()
    }


# ---------------------------------------------------------------- integer arithmetic of other processors


class PairSums(NamedTuple):
    """What 16-bit sums of neighbouring products hold."""

    largest: int
    n_saturated: int
    n_pairs: int


def pair_sums(activations: NDArray[np.uint8], weights: NDArray[np.int8]) -> PairSums:
    """Emulate how AVX2 (and AVX-512 without VNNI) adds u8 x s8 products: in pairs along the inner dimension, in int16.

    Parameters
    ----------
    activations
        uint8 array of shape (n, k).
    weights
        int8 array of shape (k, m).

    Examples
    --------
    >>> pair_sums(np.full((1, 2), 255, np.uint8), np.full((2, 1), 127, np.int8))  # 2 * 255 * 127 = 64770 > 32767
    PairSums(largest=64770, n_saturated=1, n_pairs=1)
    """
    if weights.shape[0] % 2:
        activations = np.pad(activations, ((0, 0), (0, 1)))
        weights = np.pad(weights, ((0, 1), (0, 0)))
    largest, n_saturated, n_pairs = 0, 0, 0
    wide = weights.astype(np.int32)
    for row in activations.astype(np.int32):
        products = row[:, None] * wide  # (k, m)
        sums = products[0::2] + products[1::2]
        largest = max(largest, int(np.abs(sums).max()))
        n_saturated += int(((sums > INT16_MAX) | (sums < -INT16_MAX - 1)).sum())
        n_pairs += sums.size
    return PairSums(largest, n_saturated, n_pairs)


def saturation_report(model: onnx.ModelProto, token_ids: Sequence[TokenIds]) -> dict[str, Any]:
    """Say whether an int8 graph can give other answers on a processor without VNNI.

    Parameters
    ----------
    model
        Any graph of this package; one without integer matrix products passes.
    token_ids
        A few texts whose activations are emulated.

    Returns
    -------
    dict
        ``largest_weight`` (64 or less is safe whatever the activations), and what the pair sums of these texts hold.
    """
    weights = integer_weights(model)
    report: dict[str, Any] = {"largest_weight": largest_weight(model), "n_products": len(weights)}
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    inputs = {n.name: n.input[0] for n in model.graph.node if n.op_type in INTEGER_PRODUCTS and n.name in weights}
    for name in sorted(set(inputs.values())):
        exposed.graph.output.append(onnx.ValueInfoProto(name=name))
    session = Session(exposed)
    total = PairSums(0, 0, 0)
    for row in token_ids if weights else []:
        names = sorted(set(inputs.values()))
        values = dict(zip(names, session.run(names, session.feeds(row[None])), strict=True))
        for node, tensor in inputs.items():
            activations = values[tensor].reshape(-1, values[tensor].shape[-1])
            if activations.dtype != np.uint8:
                activations = _quantize_dynamically(activations)
            found = pair_sums(activations, weights[node])
            total = PairSums(
                max(total.largest, found.largest), total.n_saturated + found.n_saturated, total.n_pairs + found.n_pairs
            )
    safe = report["largest_weight"] <= 64
    return report | {"pair_sums": total._asdict(), "safe_without_vnni": safe}


def _quantize_dynamically(x: Float32Array) -> NDArray[np.uint8]:
    """Quantize as ONNX's DynamicQuantizeLinear."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = np.float32((high - low) / 255) or np.float32(1)
    zero_point = np.clip(np.rint(-low / scale), 0, 255)
    return np.asarray(np.clip(np.rint(x / scale) + zero_point, 0, 255), np.uint8)


_EMULATED_SCRIPT = """
import sys, json, numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
types = {x.name: np.int64 if x.type == "tensor(int64)" else np.int32 for x in session.get_inputs()}
rows = []
for ids in json.load(open(sys.argv[2])):
    ids = np.array([ids])
    feeds = {n: (ids if n == "input_ids" else np.ones_like(ids)).astype(t) for n, t in types.items()}
    rows.append(session.run(["logits"], feeds)[0][0].tolist())
json.dump(rows, open(sys.argv[3], "w"))
"""

EMULATED_CPUS = {"haswell": "Haswell,-hle,-rtm,-invpcid"}  # AVX2, neither AVX-512 nor VNNI


def compare_on_cpu(
    path: Path, token_ids: Sequence[TokenIds], thresholds: Float32Array, *, cpu: str = "haswell"
) -> dict[str, Any]:
    """Run a graph here and on an emulated processor (Debian's qemu-user), about a second per text.

    Returns
    -------
    dict
        Largest logit difference; changed decisions, and how far from its threshold (as a logit) the farthest lay here.

    Raises
    ------
    VerificationError
        If the processor is unknown, qemu-x86_64 is not installed, or the run fails there.
    """
    if cpu not in EMULATED_CPUS:
        raise VerificationError(f"processor '{cpu}' is unknown: choose from {', '.join(EMULATED_CPUS)}")
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        raise VerificationError("qemu-x86_64 is not installed: install the package qemu-user, or leave the check out")
    with tempfile.TemporaryDirectory() as folder:
        texts, answers = Path(folder) / "texts.json", Path(folder) / "answers.json"
        texts.write_text(json.dumps([row.tolist() for row in token_ids]))
        command = [emulator, "-cpu", EMULATED_CPUS[cpu], sys.executable, "-c", _EMULATED_SCRIPT]
        done = subprocess.run([*command, str(path), str(texts), str(answers)], capture_output=True, text=True)
        if done.returncode or not answers.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise VerificationError(f"{path} does not run on the emulated {cpu}: {last}")
        there = np.array(json.loads(answers.read_text()), np.float32)
    here = Session(path).logits(token_ids)
    changed = decide(sigmoid(here), thresholds) != decide(sigmoid(there), thresholds)
    margins = np.abs(here - np.log(thresholds / (1 - thresholds)))[changed]
    return {
        "cpu": EMULATED_CPUS[cpu],
        "n_texts": len(here),
        "max_logit_difference": float(np.abs(here - there).max()),
        "changed_decisions": int(changed.sum()),
        "largest_margin_of_changed": float(margins.max()) if changed.any() else None,
    }


# ---------------------------------------------------------------- verdict


def judge(report: Mapping[str, Any], limits: VerificationLimits) -> list[str]:
    """Return a sentence for each limit that a graph's report exceeds; none when it passes.

    Parameters
    ----------
    report
        One graph's: what `compare_with_reference` returns, with "precision", and where they were measured
        "saturation", "latency" and "float_latency" beside it.
    limits
        What is allowed.
    """
    failed = []

    def check(what: str, value: float, limit: float) -> None:
        if not value <= limit:
            failed.append(f"{what} is {value:.4g}, the limit is {limit:.4g}")

    if report["precision"] == "fp32":
        check("the largest logit difference to Keras", report["max_logit_difference"], limits.float_logit_difference)
    else:
        deviation = report["logit_standard_deviation"]
        check(
            "the mean logit difference to Keras (in standard deviations)",
            report["mean_logit_difference"] / deviation,
            limits.int8_mean_logit_difference,
        )
        check(
            "the largest logit difference to Keras (in standard deviations)",
            report["max_logit_difference"] / deviation,
            limits.int8_max_logit_difference,
        )
    check(
        "the share of changed decisions",
        report["changed_decisions"] / report["n_decisions"],
        limits.changed_decision_share,
    )
    if "micro_f1" in report:
        loss = report["micro_f1_keras"] - report["micro_f1"]
        certain = report["n_texts"] >= FEW_ROWS or report["micro_f1_difference"]["high"] < 0
        if certain or np.isnan(loss):
            check("the loss of micro-F1", loss, limits.micro_f1_loss)
    if "latency" in report and "float_latency" in report:
        ratio = report["latency"]["p50_ms"] / report["float_latency"]["p50_ms"]
        check("median latency against fp32", ratio, limits.latency_ratio)
    if "other_cpu" in report:
        check(
            f"the largest logit difference on {report['other_cpu']['cpu']}",
            report["other_cpu"]["max_logit_difference"],
            limits.other_cpu_logit_difference,
        )
    if not report.get("saturation", {"safe_without_vnni": True})["safe_without_vnni"]:
        failed.append(
            f"weights reach {report['saturation']['largest_weight']}, and beyond 64 they can saturate on processors "
            "without VNNI"
        )
    return failed
