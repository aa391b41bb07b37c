"""Checkpoint folder to bundle folder: graphs, thresholds, labels, tokenizer, model card, manifest.

    onnx/model.onnx             portable, float32
    onnx/model_quantized.onnx   portable, int8 (scales at run time)
    onnx/model_fast.onnx        ONNX Runtime's CPU kernels, int8
    config.json, tokenizer.json, tokenizer_config.json  what Hugging Face's tools read, in Python and JavaScript
    emodistill.json             label names, thresholds, calibration, which graph is the default
    verification.json           what the gate measured
    README.md, manifest.json    model card; sha256 of every other file

Thresholds belong to a graph: each gets its own, searched on the held-out rows with its own logits, one text per call.
A graph that fails its limits is not the default, and verification.json says why.
"""

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

import emodistill
from emodistill.artifacts import file_sha256, part_folder, read_json, write_json
from emodistill.checkpoints import ModelCheckpoint, load_checkpoint
from emodistill.errors import ConfigError, InputError, VerificationError
from emodistill.export.fused import build_fused
from emodistill.export.portable import LATEST_TESTED_OPSET, KerasReference, write_portable
from emodistill.export.quantization import (
    ActivationRange,
    dynamic_linear,
    int8_embedding,
    observe_ranges,
    quantize_portable,
    static_linear,
)
from emodistill.export.verification import (
    Session,
    VerificationLimits,
    compare_on_cpu,
    compare_with_reference,
    judge,
    measure_latency,
    neighbour_test,
    saturation_report,
)
from emodistill.thresholds import search_label_thresholds, search_shared_threshold, sigmoid
from emodistill.tokenization import encode, load_tokenizer

__all__ = [
    "BUNDLE_FORMAT",
    "FAST_PRECISIONS",
    "ExportSettings",
    "build_fast",
    "export_bundle",
    "fixed_ranges",
    "write_bundle",
    "write_minimal_bundle",
]

BUNDLE_FORMAT = 1
FAST_PRECISIONS = ("int8-static", "int8-dynamic", "fp32")

_PORTABLE = "onnx/model.onnx"
_PORTABLE_INT8 = "onnx/model_quantized.onnx"
_FAST = "onnx/model_fast.onnx"

Float32Array = NDArray[np.float32]
TokenIds = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of an export.

    Parameters
    ----------
    opset
        Of the portable files.
    with_portable
        Write the portable files; without them the bundle holds the fast graph alone.
    fast_precisions
        Precisions of the fast graph to try, in order of preference: the first that passes its limits is kept.
    weight_bits
        7 is safe on every processor; 8 is a little closer to float and saturates on processors without VNNI.
    shared_threshold
        One threshold for all labels; otherwise one per label, drawn towards the shared one where positives are few.
    n_range_texts
        Texts that fixed activation ranges are observed on, at least 1.
    n_latency_texts
        Texts that latency is measured on, at least 1.
    verify_cpu
        Processor to emulate with qemu ("haswell"); None leaves the check out.
    n_cpu_texts
        Texts to run there, about a second each.
    limits
        What a graph may differ by.
    """

    opset: int = LATEST_TESTED_OPSET
    with_portable: bool = True
    fast_precisions: tuple[str, ...] = ("int8-static", "int8-dynamic")
    weight_bits: int = 7
    shared_threshold: bool = True
    n_range_texts: int = 512
    n_latency_texts: int = 100
    verify_cpu: str | None = None
    n_cpu_texts: int = 50
    limits: VerificationLimits = field(default_factory=VerificationLimits)

    def __post_init__(self) -> None:
        unknown = [name for name in self.fast_precisions if name not in FAST_PRECISIONS]
        if unknown or not self.fast_precisions:
            raise ConfigError(
                f"fast_precisions {list(self.fast_precisions)}: choose at least one of {', '.join(FAST_PRECISIONS)}"
            )


def build_fast(
    checkpoint: ModelCheckpoint,
    precision: str,
    *,
    activation_ranges: Mapping[str, ActivationRange] | None = None,
    weight_bits: int = 7,
    masked: bool = False,
) -> onnx.ModelProto:
    """Write the fast graph of a checkpoint in one of `FAST_PRECISIONS`.

    Parameters
    ----------
    checkpoint
        Member or student.
    precision
        "fp32", "int8-dynamic" or "int8-static".
    activation_ranges
        For "int8-static", from `emodistill.export.quantization.observe_ranges`.
    weight_bits
        7 or 8.
    masked
        With an input ``attention_mask``, for padded batches.
    """
    common: dict[str, Any] = {
        "pooling": checkpoint.pooling,
        "max_length_tokens": checkpoint.max_length_tokens,
        "masked": masked,
    }
    if precision == "fp32":
        return build_fused(checkpoint.config, checkpoint.weights, **common)
    if precision == "int8-dynamic":
        linear = dynamic_linear(n_bits=weight_bits)
    elif precision == "int8-static":
        if activation_ranges is None:
            raise ConfigError("int8-static needs activation_ranges: observe them on some texts first")
        linear = static_linear(activation_ranges, n_bits=weight_bits)
    else:
        raise ConfigError(f"precision '{precision}' is unknown: choose from {', '.join(FAST_PRECISIONS)}")
    common |= {
        "packed": precision == "int8-dynamic",
        "approximate_gelu": True,
        "linear": linear,
        "embedding": int8_embedding(),
    }
    return build_fused(checkpoint.config, checkpoint.weights, **common)


def export_bundle(
    checkpoint_dir: Path | str,
    bundle_dir: Path | str,
    *,
    held_out_texts: Sequence[str],
    held_out_labels: NDArray[np.int8] | None = None,
    settings: ExportSettings | None = None,
    thresholds: Sequence[float] | None = None,
    calibration: tuple[Sequence[float], Sequence[float]] | None = None,
    range_texts: Sequence[str] | None = None,
    card: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Write the bundle of a checkpoint beside its place and rename it there, over an earlier one.

    Parameters
    ----------
    checkpoint_dir
        Member or student folder.
    bundle_dir
        Where the bundle goes.
    held_out_texts, held_out_labels
        Rows that the model was not trained on (and that are not the test set): thresholds are searched on them and
        every graph is compared with Keras on them. Labels are an int8 multi-hot array (n_texts, n_labels).
    settings
        Precisions, limits and so on.
    thresholds
        One per label, instead of searching; 0.5 each when there are no labels either.
    calibration
        (scale, bias), one number per label each: probability = sigmoid(scale * logit + bias).
    range_texts
        Texts for fixed activation ranges; by default the first of `held_out_texts`. A student that was trained for
        int8 brings its ranges along (activation_ranges.json in `checkpoint_dir`), and these texts are not asked.
    card
        Paragraphs of the model card by heading ("Data", "Training", "Licence", ...), and "title" and "license".
    say
        Receives a sentence per step.

    Returns
    -------
    dict
        The report that is also in verification.json.

    Raises
    ------
    InputError
        If no texts are given or labels do not fit.
    VerificationError
        If the portable file does not answer as Keras does.
    """
    bundle_dir = Path(bundle_dir)
    part = part_folder(bundle_dir)
    shutil.rmtree(part, ignore_errors=True)
    report = write_bundle(
        checkpoint_dir,
        part,
        held_out_texts=held_out_texts,
        held_out_labels=held_out_labels,
        settings=settings,
        thresholds=thresholds,
        calibration=calibration,
        range_texts=range_texts,
        card=card,
        say=say,
    )
    if bundle_dir.is_dir():
        shutil.rmtree(bundle_dir)
    part.rename(bundle_dir)
    return report


def write_bundle(
    checkpoint_dir: Path | str,
    folder: Path | str,
    *,
    held_out_texts: Sequence[str],
    held_out_labels: NDArray[np.int8] | None = None,
    settings: ExportSettings | None = None,
    thresholds: Sequence[float] | None = None,
    calibration: tuple[Sequence[float], Sequence[float]] | None = None,
    range_texts: Sequence[str] | None = None,
    card: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Write the files of a bundle into a folder (made if absent) that the caller publishes; see `export_bundle`."""
    settings = settings or ExportSettings()
    checkpoint_dir, folder = Path(checkpoint_dir), Path(folder)
    checkpoint = load_checkpoint(checkpoint_dir)
    _check_rows(checkpoint, held_out_texts, held_out_labels, thresholds, calibration)
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(checkpoint_dir / name, folder / name)
    write_json(folder / "tokenizer_config.json", _tokenizer_config(checkpoint))

    tokenizer = load_tokenizer(checkpoint_dir)
    token_ids = encode(tokenizer, held_out_texts, checkpoint.max_length_tokens)
    say(f"Keras logits of {len(token_ids):,} held-out texts")
    reference = KerasReference(checkpoint)
    chooser = _ThresholdChooser(held_out_labels, thresholds, calibration, settings.shared_threshold)
    gate = _Gate(checkpoint, settings, token_ids, held_out_labels, reference.logits(token_ids), chooser)

    activation_ranges = None
    if "int8-static" in settings.fast_precisions:
        rows = token_ids if range_texts is None else encode(tokenizer, range_texts, checkpoint.max_length_tokens)
        activation_ranges = fixed_ranges(checkpoint_dir, checkpoint, rows[: settings.n_range_texts])
    float_twin = Session(build_fast(checkpoint, "fp32"))
    graphs: dict[str, dict[str, Any]] = {}
    if settings.with_portable:
        say("portable float32 graph")
        write_portable(reference, folder / _PORTABLE, opset=settings.opset)
        graphs[_PORTABLE] = gate.report(folder / _PORTABLE, "fp32", portable=True)
        if graphs[_PORTABLE]["failed"]:
            raise VerificationError(f"{_PORTABLE} does not answer as Keras: {'; '.join(graphs[_PORTABLE]['failed'])}")
        say("portable int8 graph")
        quantize_portable(folder / _PORTABLE, folder / _PORTABLE_INT8, n_bits=settings.weight_bits)
        twin = Session(folder / _PORTABLE)
        graphs[_PORTABLE_INT8] = gate.report(folder / _PORTABLE_INT8, "int8-dynamic", portable=True, float_twin=twin)
    graphs[_FAST], tried = _write_fast(folder / _FAST, checkpoint, settings, gate, activation_ranges, float_twin, say)

    default = next(
        (name for name in (_FAST, _PORTABLE_INT8, _PORTABLE) if name in graphs and not graphs[name]["failed"]), None
    )
    if default is None:
        raise VerificationError(
            f"no graph of the bundle passes its limits ({_FAST}: {'; '.join(graphs[_FAST]['failed'])}): "
            "write the portable files too, or add fp32 to fast_precisions"
        )
    report = {
        "default_graph": default,
        "graphs": graphs,
        "fast_precisions_tried": tried,
        "limits": settings.limits,
        "machine": _machine(),
    }
    for name, entry in graphs.items():
        _set_metadata(folder / name, checkpoint, entry)
        entry["size_bytes"] = (folder / name).stat().st_size
    write_json(folder / "emodistill.json", _describe(checkpoint, default, graphs))
    write_json(folder / "verification.json", report)
    (folder / "README.md").write_text(_model_card(checkpoint, report, card or {}), encoding="utf-8")
    _write_manifest(folder)
    return report


def write_minimal_bundle(bundle_dir: Path | str, target: Path | str) -> Path:
    """Copy only what an application needs from a bundle: its default graph, the tokenizer and the JSON beside them.

    Parameters
    ----------
    bundle_dir
        A whole bundle.
    target
        New folder, written beside and renamed; an earlier one is replaced.

    Returns
    -------
    Path
        `target`. `emodistill.Classifier.load(target)` answers as the whole bundle does.

    Raises
    ------
    ArtifactError
        If `bundle_dir` is no bundle.
    """
    bundle_dir, target = Path(bundle_dir), Path(target)
    description = read_json(bundle_dir / "emodistill.json")
    default = description["default_graph"]
    part = part_folder(target)
    shutil.rmtree(part, ignore_errors=True)
    (part / default).parent.mkdir(parents=True)
    for name in (default, "config.json", "tokenizer.json"):
        shutil.copyfile(bundle_dir / name, part / name)
    write_json(part / "emodistill.json", description | {"graphs": {default: description["graphs"][default]}})
    _write_manifest(part)
    if target.is_dir():
        shutil.rmtree(target)
    part.rename(target)
    return target


# ---------------------------------------------------------------- graphs


def fixed_ranges(
    checkpoint_dir: Path, checkpoint: ModelCheckpoint, token_ids: Sequence[TokenIds]
) -> dict[str, ActivationRange]:
    """Return the ranges that a student trained for int8 brings along, or those that are seen on some texts.

    Parameters
    ----------
    checkpoint_dir, checkpoint
        Folder and content.
    token_ids
        Texts to look at, int32 (n_tokens,) each.
    """
    path = checkpoint_dir / "activation_ranges.json"
    if path.is_file():
        return {name: ActivationRange(*ends) for name, ends in read_json(path).items()}
    model = build_fused(
        checkpoint.config,
        checkpoint.weights,
        pooling=checkpoint.pooling,
        max_length_tokens=checkpoint.max_length_tokens,
        masked=False,
        expose_linear_inputs=True,
    )
    return observe_ranges(model, token_ids)


def _write_fast(
    path: Path,
    checkpoint: ModelCheckpoint,
    settings: ExportSettings,
    gate: "_Gate",
    activation_ranges: Mapping[str, ActivationRange] | None,
    float_twin: Session,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Write the first precision that passes, or the one that fails the fewest limits; say how each fared."""
    tried: dict[str, list[str]] = {}
    best: tuple[onnx.ModelProto, dict[str, Any]] | None = None
    for precision in settings.fast_precisions:
        say(f"fast graph, {precision}")
        model = build_fast(checkpoint, precision, activation_ranges=activation_ranges, weight_bits=settings.weight_bits)
        onnx.save(model, path)
        entry = gate.report(path, precision, portable=False, float_twin=None if precision == "fp32" else float_twin)
        tried[precision] = entry["failed"]
        if best is None or len(entry["failed"]) < len(best[1]["failed"]):
            best = model, entry
        if not entry["failed"]:
            break
    assert best is not None  # there is at least one precision
    onnx.save(best[0], path)
    return best[1], tried


@dataclass(frozen=True)
class _ThresholdChooser:
    labels: NDArray[np.int8] | None
    given: Sequence[float] | None
    calibration: tuple[Sequence[float], Sequence[float]] | None
    shared: bool

    def calibrated(self, logits: Float32Array) -> Float32Array:
        """Return the logits whose sigmoid is the calibrated probability."""
        if self.calibration is None:
            return logits
        scale, bias = (np.asarray(values, np.float64) for values in self.calibration)
        return (scale * logits + bias).astype(np.float32)

    def on_raw_probabilities(self, thresholds: Float32Array) -> Float32Array:
        """Return the thresholds that decide the same on the sigmoid of uncalibrated logits."""
        if self.calibration is None:
            return thresholds
        scale, bias = (np.asarray(values, np.float64) for values in self.calibration)
        wide = np.clip(thresholds.astype(np.float64), 1e-7, 1 - 1e-7)
        return sigmoid((np.log(wide / (1 - wide)) - bias) / scale)

    def choose(self, logits: Float32Array) -> Float32Array:
        n_labels = logits.shape[1]
        if self.given is not None:
            return np.array(self.given, np.float32)
        if self.labels is None:
            return np.full(n_labels, 0.5, np.float32)
        probabilities = sigmoid(self.calibrated(logits))
        shared = _between(search_shared_threshold(self.labels, probabilities), probabilities)
        if self.shared:
            return np.full(n_labels, shared, np.float32)
        return search_label_thresholds(self.labels, probabilities, towards=shared)


def _between(threshold: float, probabilities: Float32Array) -> float:
    """Move a threshold off the probability it was found at, half-way to the next lower one: no row lies on the edge."""
    lower = probabilities[probabilities < threshold]
    return float((threshold + lower.max()) / 2) if lower.size else threshold


@dataclass(frozen=True)
class _Gate:
    """Measures graphs on the held-out rows and says which limits they exceed."""

    checkpoint: ModelCheckpoint
    settings: ExportSettings
    token_ids: list[TokenIds]
    labels: NDArray[np.int8] | None
    keras_logits: Float32Array
    chooser: _ThresholdChooser

    def report(
        self, path: Path, precision: str, *, portable: bool, float_twin: Session | None = None
    ) -> dict[str, Any]:
        limits = self.settings.limits
        session = Session(path)
        logits = session.logits(self.token_ids)
        thresholds = self.chooser.choose(logits)
        entry: dict[str, Any] = {"precision": precision, "portable": portable, "thresholds": thresholds.tolist()}
        entry["calibration_scale"], entry["calibration_bias"] = (
            (None, None) if self.chooser.calibration is None else map(list, self.chooser.calibration)
        )
        entry |= compare_with_reference(
            self.chooser.calibrated(logits),
            self.chooser.calibrated(self.keras_logits),
            y_true=self.labels,
            thresholds=thresholds,
            reference_thresholds=self.chooser.choose(self.keras_logits),
        )
        entry["neighbours"] = neighbour_test(
            session, self.token_ids, self.checkpoint.config.pad_token_id, self.chooser.on_raw_probabilities(thresholds)
        )
        entry["batchable"] = entry["neighbours"]["max_logit_difference"] <= limits.neighbour_logit_difference
        if precision != "fp32":
            entry["saturation"] = saturation_report(onnx.load(path), self.token_ids[:3])
        sessions = {"graph": session} | ({"float": float_twin} if float_twin else {})
        latency = measure_latency(sessions, self.token_ids[: self.settings.n_latency_texts])
        entry["latency"] = latency["graph"]
        if float_twin:
            entry["float_latency"] = latency["float"]
        if self.settings.verify_cpu and precision != "fp32":
            rows = self.token_ids[: self.settings.n_cpu_texts]
            entry["other_cpu"] = compare_on_cpu(
                path, rows, self.chooser.on_raw_probabilities(thresholds), cpu=self.settings.verify_cpu
            )
        entry["failed"] = judge(entry, limits)
        return entry


# ---------------------------------------------------------------- files beside the graphs


def _describe(checkpoint: ModelCheckpoint, default: str, graphs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    kept = ("precision", "thresholds", "calibration_scale", "calibration_bias", "batchable", "portable")
    return {
        "format": BUNDLE_FORMAT,
        "label_names": list(checkpoint.label_names),
        "max_length_tokens": checkpoint.max_length_tokens,
        "pad_token_id": checkpoint.config.pad_token_id,
        "default_graph": default,
        "graphs": {name: {key: entry[key] for key in kept} for name, entry in graphs.items()},
    }


def _tokenizer_config(checkpoint: ModelCheckpoint) -> dict[str, Any]:
    """Name the special tokens as transformers wants them; they are those that tokenizer.json itself uses."""
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json)
    first, last = tokenizer.encode("").tokens
    unknown = json.loads(checkpoint.tokenizer_json)["model"].get("unk_token")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": checkpoint.max_length_tokens,
        "model_input_names": ["input_ids", "attention_mask"],
        "pad_token": tokenizer.id_to_token(checkpoint.config.pad_token_id),
        "cls_token": first,
        "sep_token": last,
        **({"unk_token": unknown} if unknown else {}),
    }


def _set_metadata(path: Path, checkpoint: ModelCheckpoint, entry: Mapping[str, Any]) -> None:
    """Write into the ONNX file what an application needs beside logits."""
    model = onnx.load(path)
    del model.metadata_props[:]
    values = {
        "label_names": list(checkpoint.label_names),
        "thresholds": entry["thresholds"],
        "calibration_scale": entry["calibration_scale"],
        "calibration_bias": entry["calibration_bias"],
        "max_length_tokens": checkpoint.max_length_tokens,
        "problem_type": "multi_label_classification",
        "precision": entry["precision"],
        "emodistill_version": emodistill.__version__,
    }
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    onnx.helper.set_model_props(model, texts)
    onnx.save(model, path)


def _write_manifest(folder: Path) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"size_bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in _NOT_IN_MANIFEST
    }
    write_json(folder / "manifest.json", {"format": BUNDLE_FORMAT, "files": files})


_NOT_IN_MANIFEST = ("manifest.json", "started.json", "complete.json")


def _machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "flags": _cpu_flags(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "onnx": onnx.__version__,
        "emodistill": emodistill.__version__,
    }


def _cpu_flags() -> list[str]:
    """Return which instructions for integer products this processor has, where the system says so."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    words = set(text.split())
    return [
        flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm") if flag in words
    ]


def _model_card(checkpoint: ModelCheckpoint, report: Mapping[str, Any], card: Mapping[str, str]) -> str:
    labels = ", ".join(checkpoint.label_names)
    config = checkpoint.config
    lines = [
        "---",
        f"license: {card.get('license', 'other')}",
        "pipeline_tag: text-classification",
        "library_name: onnx",
        "tags: [emotion, multi-label, onnx, emodistill]",
        "---",
        "",
        f"# {card.get('title', 'Multi-label text classifier')}",
        "",
        f"Gives each text none, one or several of: {labels}. Each label has a probability of its own (a sigmoid); they "
        "do not sum to 1.",
        "",
        f"A {config.family} encoder of {config.n_layers} layers of width {config.hidden_size}, {config.vocab_size:,} "
        f"word pieces, {checkpoint.pooling} pooling; {config.n_parameters:,} weights. Texts longer than "
        f"{checkpoint.max_length_tokens} tokens are cut.",
        "",
        "```python",
        "from emodistill import Classifier",
        "",
        'Classifier.load("path/to/this/folder").predict(["Thanks, I owe you one"])',
        "```",
        "",
        "## Graphs",
        "",
        *_graph_table(report),
        "",
        f"The default is `{report['default_graph']}`. Latency is the median of one text per call on one core, without "
        "tokenizing, on the machine named in `verification.json`. Micro-F1 is measured on held-out rows, thresholds "
        "searched on the other half of them.",
        "",
    ]
    for name, entry in report["graphs"].items():
        if entry["failed"]:
            lines += [f"`{name}` is not a default because {'; '.join(entry['failed'])}.", ""]
    for heading, paragraph in card.items():
        if heading not in ("title", "license"):
            lines += [f"## {heading}", "", paragraph, ""]
    lines += ["## Limits", "", _LIMITS, ""]
    return "\n".join(lines)


_LIMITS = (
    "The labels say what annotators read in short English comments, not what their writers felt; the data are biased "
    "towards the people who wrote and annotated them. Rare labels are learnt from few examples. Other languages, long "
    "documents and decisions about people are outside of what was tested. Graphs that are not batchable choose one "
    "scale per call: give them one text at a time."
)


def _graph_table(report: Mapping[str, Any]) -> list[str]:
    rows = [
        "| graph | precision | size MB | micro-F1 (95 %) | latency ms | largest logit difference | batchable |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in report["graphs"].items():
        f1 = "n/a"
        if "micro_f1" in entry:
            low, high = entry["micro_f1_interval"]
            f1 = f"{entry['micro_f1']:.4f} ({low:.3f}-{high:.3f})"
        rows.append(
            f"| {name} | {entry['precision']} | {entry['size_bytes'] / 1e6:.1f} | {f1} "
            f"| {entry['latency']['p50_ms']:.2f} | {entry['max_logit_difference']:.3g} "
            f"| {'yes' if entry['batchable'] else 'no'} |"
        )
    return rows


# ---------------------------------------------------------------- checks at the door


def _check_rows(
    checkpoint: ModelCheckpoint,
    texts: Sequence[str],
    labels: NDArray[np.int8] | None,
    thresholds: Sequence[float] | None,
    calibration: tuple[Sequence[float], Sequence[float]] | None,
) -> None:
    n_labels = len(checkpoint.label_names)
    if len(texts) < 2:
        raise InputError(f"{len(texts)} held-out texts: an export is compared with Keras on at least two")
    if labels is not None and labels.shape != (len(texts), n_labels):
        raise InputError(f"held-out labels have shape {labels.shape}, expected {(len(texts), n_labels)}")
    per_label = {"thresholds": thresholds}
    if calibration is not None:
        per_label |= {"calibration scale": calibration[0], "calibration bias": calibration[1]}
    for what, values in per_label.items():
        if values is not None and len(values) != n_labels:
            raise InputError(f"{what} has {len(values)} numbers, expected {n_labels}: one per label")
