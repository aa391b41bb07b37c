"""The results of a run: every model's logits, submissions, the trade-off report, and the copy that is committed."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from emodistill.artifacts import read_json, write_bytes, write_json
from emodistill.checkpoints import load_checkpoint, save_checkpoint
from emodistill.cli.members import variant_logits
from emodistill.cli.planning import MemberPlan, Plan
from emodistill.cli.run_folder import RunFolder
from emodistill.data import write_submission
from emodistill.errors import ArtifactError
from emodistill.logits import ModelLogits, read_model_logits, write_model_logits
from emodistill.progress import Progress
from emodistill.thresholds import decide, search_shared_threshold, sigmoid

if TYPE_CHECKING:
    from emodistill.benchmarks.baseline import TfidfBaseline
    from emodistill.benchmarks.latency import LatencyReport, TextModel
    from emodistill.benchmarks.tradeoff import RefereeStep

__all__ = ["copy_results", "copy_students", "write_logits", "write_report", "write_submissions"]

MEMBER_BENCH_TEXTS = 30  # an ensemble of large encoders takes a second a text
MEMBER_BENCH_WARMUP = 3
ENSEMBLE = "ensemble"
TFIDF_BASELINE = "TF-IDF + logistic regression"
CHUNK = 1024  # texts between two steps of the progress line
MOST_BYTES_OF_A_FILE = 24_000_000  # of a repository; 25 MB is a common limit
FAST_GRAPH = "onnx/model_fast.onnx"
FLOAT_GRAPH = "onnx/model.onnx"

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the run with what it said, ready to be scored or submitted.

    Attributes
    ----------
    name : str
        Name of its files.
    kind : {"member", "ensemble", "student"}
    logits : ModelLogits
        For students `oof` holds the held-out rows.
    scale, bias : float array of shape (n_labels,) or None
        Calibration: probability = sigmoid(scale * logit + bias).
    thresholds : float32 array of shape (n_labels,)
    size_bytes : int or None
    note : str
    """

    name: str
    kind: Literal["member", "ensemble", "student"]
    logits: ModelLogits
    thresholds: NDArray[np.float32]
    scale: NDArray[np.float64] | None = None
    bias: NDArray[np.float64] | None = None
    size_bytes: int | None = None
    note: str = ""

    def decide(self, logits: NDArray[np.float32]) -> NDArray[np.int8]:
        """Turn this model's logits into decisions."""
        calibrated = logits if self.scale is None or self.bias is None else self.scale * logits + self.bias
        return decide(sigmoid(calibrated), self.thresholds)


# ---------------------------------------------------------------- logits


def write_logits(plan: Plan, students: Sequence[str], folder: Path, say: Say) -> None:
    """Write what every model said, one file each: the variants, the ensemble, each student as float32 and int8.

    A student has no out-of-fold rows: its `oof` holds the train rows that were kept from it, as fold 0 of folds 0 and
    -1 (the rows it was trained on).

    Parameters
    ----------
    plan : Plan
    students : sequence of str
        Those with a finished bundle.
    folder : Path
        Where the files go.
    say : callable
        Receives a sentence per student.
    """
    run = plan.run
    for name, logits in variant_logits(run, plan.finished_members).items():
        write_model_logits(folder / f"{name}.npz", logits)
    write_bytes(folder / f"{ENSEMBLE}.npz", (run.ensemble_folder / "oof.npz").read_bytes())
    for student in students:
        with np.load(run.student_folder(student) / "logits.npz", allow_pickle=False) as saved:
            held_out_rows = saved["held_out_rows"]
            float_logits = {name: saved[name].astype(np.float32) for name in ("held_out", *run.data.rows)}
        write_model_logits(folder / f"{student}-fp32.npz", _student_logits(run, held_out_rows, float_logits))
        say(f"{student}: answers of its int8 graph, one text at a time")
        int8_logits = _classifier_logits(run, student, held_out_rows)
        write_model_logits(folder / f"{student}-int8.npz", _student_logits(run, held_out_rows, int8_logits))


def _classifier_logits(run: RunFolder, student: str, held_out_rows: NDArray[np.int32]) -> dict[str, Any]:
    from emodistill.runtime import Classifier

    classifier = Classifier.load(run.bundle_folder(student), graph=FAST_GRAPH)
    texts = {"held_out": [run.data.train_texts[row] for row in held_out_rows], **run.data.evaluation_texts}
    logits = {}
    with Progress(f"{student} int8", sum(map(len, texts.values())), "texts") as progress:
        for name, rows in texts.items():
            parts = [classifier.predict_logits(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK)]
            logits[name] = np.concatenate(parts) if parts else np.zeros((0, len(run.data.label_names)), np.float32)
            progress.advance(len(rows))
    return logits


def _student_logits(run: RunFolder, held_out_rows: NDArray[np.int32], logits: Mapping[str, Any]) -> ModelLogits:
    data = run.data
    oof = np.full((len(data.train_texts), len(data.label_names)), np.nan, np.float32)
    oof[held_out_rows] = logits["held_out"]
    fold_ids = np.full(len(oof), -1, np.int8)
    fold_ids[held_out_rows] = 0
    return ModelLogits(
        oof=oof,
        fold_ids=fold_ids,
        folds=np.zeros(1, np.int8),
        train_rows=data.train_rows,
        rows=data.rows,
        averages={name: logits[name] for name in data.rows},
        label_names=data.label_names,
    )


# ---------------------------------------------------------------- the models of a run


def collect_models(plan: Plan, students: Sequence[str]) -> list[Model]:
    """Return every model of a run, with the logits that `write_logits` saved."""
    saved = {path.stem: read_model_logits(path) for path in plan.run.logits_folder.glob("*.npz")}
    variants = dict.fromkeys(member.variant.name for member in plan.finished_members)
    return [
        *(_variant_model(plan.run, name, saved[name]) for name in variants),
        _ensemble_model(plan, saved[ENSEMBLE]),
        *(_student_model(plan.run, name, graph, saved) for name in students for graph in (FLOAT_GRAPH, FAST_GRAPH)),
    ]


def _variant_model(run: RunFolder, name: str, logits: ModelLogits) -> Model:
    known = np.isfinite(logits.oof).all(axis=1)
    threshold = search_shared_threshold(run.data.train_labels[known], sigmoid(logits.oof[known]))
    files = [run.member_folder(name, int(fold)) / "weights.safetensors" for fold in logits.folds]
    return Model(
        name=name,
        kind="member",
        logits=logits,
        thresholds=np.full(len(logits.label_names), threshold, np.float32),
        size_bytes=_total_size(files),
        note=f"average of {len(files)} folds; one threshold, {threshold:.2f}, from its out-of-fold rows",
    )


def _ensemble_model(plan: Plan, logits: ModelLogits) -> Model:
    thresholds = read_json(plan.run.ensemble_folder / "thresholds.json")
    files = [member.folder / "weights.safetensors" for member in plan.combined_members if _is_encoder(member)]
    return Model(
        name=ENSEMBLE,
        kind="ensemble",
        logits=logits,  # calibrated when they were saved
        thresholds=np.array([thresholds["thresholds"][label] for label in logits.label_names], np.float32),
        size_bytes=_total_size(files),
        note=f"{len(plan.combined_members)} members, rule {thresholds['rule']}",
    )


def _student_model(run: RunFolder, student: str, graph: str, saved: Mapping[str, ModelLogits]) -> Model:
    bundle = run.bundle_folder(student)
    entry = read_json(bundle / "emodistill.json")["graphs"][graph]
    has_calibration = entry["calibration_scale"] is not None
    name = f"{student}-{'fp32' if graph == FLOAT_GRAPH else 'int8'}"
    return Model(
        name=name,
        kind="student",
        logits=saved[name],
        thresholds=np.array(entry["thresholds"], np.float32),
        scale=np.array(entry["calibration_scale"]) if has_calibration else None,
        bias=np.array(entry["calibration_bias"]) if has_calibration else None,
        size_bytes=(bundle / graph).stat().st_size,
        note=f"{graph}, {entry['precision']}",
    )


def _total_size(files: Sequence[Path]) -> int | None:
    """Add up file sizes; None where there are no weights: TF-IDF members, and members reused from saved logits."""
    return sum(file.stat().st_size for file in files) if files and all(file.is_file() for file in files) else None


def _is_encoder(member: MemberPlan) -> bool:
    return member.variant.kind == "encoder"


# ---------------------------------------------------------------- submissions


def write_submissions(plan: Plan, students: Sequence[str], folder: Path) -> None:
    """Write one zip per model, and one per rule of combining.

    Parameters
    ----------
    plan : Plan
    students : sequence of str
        Those with a finished bundle.
    folder : Path
        Where the zips go.
    """
    run = plan.run
    test = run.data.test
    if test is None:
        raise ArtifactError("this run has no test file: give one with --test FILE")
    decisions = {model.name: model.decide(model.logits.averages["test"]) for model in collect_models(plan, students)}
    with np.load(run.ensemble_folder / "rules.npz", allow_pickle=False) as by_rule:
        decisions |= {f"{ENSEMBLE}-{rule}": by_rule[rule] for rule in by_rule.files}
    for name, decided in decisions.items():
        write_submission(folder / f"{name}.zip", test, decided, label_names=run.data.label_names)


# ---------------------------------------------------------------- the report


def write_report(plan: Plan, students: Sequence[str], folder: Path, say: Say) -> None:
    """Measure every model and write table.txt, tradeoff.json and index.html.

    Models are scored on dev; without one, on the train rows that no student saw, where members and ensemble are
    out-of-fold.

    Parameters
    ----------
    plan : Plan
    students : sequence of str
        Those with a finished bundle.
    folder : Path
        Folder named "report" that the files go to.
    say : callable
        Receives a sentence per step.
    """
    from emodistill.benchmarks.baseline import TfidfBaseline
    from emodistill.benchmarks.machine import machine_record
    from emodistill.benchmarks.tradeoff import ModelResult, build_report, format_table

    run, data = plan.run, plan.run.data
    models = collect_models(plan, students)
    scored = _scored_rows(run, models)
    if scored.is_dev:
        say("fitting the TF-IDF baseline")
    baseline = TfidfBaseline.fit(data.train_texts, data.train_labels, run.fold_ids) if scored.is_dev else None
    say("measuring latency, one text at a time")
    latency = _measure(plan, models, students, baseline, scored.texts)
    results = [
        ModelResult.from_decisions(
            name,
            "baseline",
            scored.labels,
            decided,
            data.label_names,
            latency=latency.get(name),
            size_bytes=size,
            note=note,
        )
        for name, decided, size, note in _baselines(baseline, scored)
    ]
    results += [
        ModelResult.from_decisions(
            model.name,
            model.kind,
            scored.labels,
            scored.decisions[model.name],
            data.label_names,
            latency=latency.get(model.name),
            size_bytes=model.size_bytes,
            note=model.note,
        )
        for model in models
    ]
    combination = read_json(run.ensemble_folder / "combination.json")
    write_bytes(folder / "table.txt", (format_table(results) + f"\n(scored on {scored.name})\n").encode())
    steps = [_referee_step(step) for step in combination["steps"] if step["score"] is not None]
    build_report(
        folder,
        results,
        title=run.path.resolve().name,
        scored_on=scored.name,
        machine=machine_record(threads=run.settings.bench.threads),
        referee_steps=steps,
        notes=[*combination["notes"], *scored.notes],
    )
    for path in (folder / "report").iterdir():
        path.replace(folder / path.name)
    (folder / "report").rmdir()


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """The rows that models are scored on, and each model's decisions of them."""

    name: str
    is_dev: bool
    texts: list[str]
    labels: NDArray[np.int8]
    decisions: dict[str, NDArray[np.int8]]
    notes: list[str]


def _scored_rows(run: RunFolder, models: Sequence[Model]) -> _Scored:
    data = run.data
    if data.dev_labels is not None and run.paths.dev is not None:
        return _Scored(
            name=run.paths.dev.name,
            is_dev=True,
            texts=data.evaluation_texts["dev"],
            labels=data.dev_labels,
            decisions={model.name: model.decide(model.logits.averages["dev"]) for model in models},
            notes=[],
        )
    with np.load(run.ensemble_folder / "cross_fitted.npz", allow_pickle=False) as saved:
        cross_fitted = np.full(data.train_labels.shape, -1, np.int8)
        if len(saved["decisions"]):
            cross_fitted[saved["rows"]] = saved["decisions"]
    known = np.logical_and.reduce([np.isfinite(model.logits.oof).all(axis=1) for model in models])
    rows = np.flatnonzero(known & (cross_fitted >= 0).all(axis=1))
    if not len(rows):
        raise ArtifactError(
            "there are no rows to score: give a dev file with --dev, or train members on two folds at least"
        )
    decisions = {model.name: model.decide(model.logits.oof[rows]) for model in models}
    decisions[ENSEMBLE] = cross_fitted[rows]
    why = "the final members were trained on dev too" if run.settings.use_dev else "no dev file was given"
    return _Scored(
        name="train rows that no model saw",
        is_dev=False,
        texts=[data.train_texts[row] for row in rows],
        labels=data.train_labels[rows],
        decisions=decisions,
        notes=[
            f"{why}: scores are on {len(rows):,} train rows, members out-of-fold, the ensemble cross-fitted; "
            "the one threshold of each member and student was chosen with the help of these rows"
        ],
    )


def _baselines(
    baseline: "TfidfBaseline | None", scored: _Scored
) -> Iterator[tuple[str, NDArray[np.int8], int | None, str]]:
    from emodistill.benchmarks.baseline import all_negative

    yield "all negative", all_negative(*scored.labels.shape), None, "no label for any text"
    if baseline is None:
        return
    note = "words and pairs of words, logistic regression, one threshold from out-of-fold rows"
    yield TFIDF_BASELINE, baseline.decide(scored.texts), baseline.size_bytes, note


def _measure(
    plan: Plan, models: Sequence[Model], students: Sequence[str], baseline: "TfidfBaseline | None", texts: Sequence[str]
) -> dict[str, "LatencyReport"]:
    """Measure the small models together on many texts, then the large ones on few."""
    from emodistill.benchmarks.latency import BundleModel, measure_latency

    settings = plan.run.settings.bench
    small: dict[str, TextModel] = {} if baseline is None else {TFIDF_BASELINE: baseline}
    for student in students:
        for graph, suffix in ((FLOAT_GRAPH, "fp32"), (FAST_GRAPH, "int8")):
            small[f"{student}-{suffix}"] = BundleModel(plan.run.bundle_folder(student), graph=graph)
    measured = {} if not small else measure_latency(small, texts[: settings.n_texts], n_repeats=settings.n_repeats)
    with tempfile.TemporaryDirectory() as scratch:
        large = _large_models(plan, models, Path(scratch))
        if large:
            some = texts[: min(MEMBER_BENCH_TEXTS, settings.n_texts)]
            measured |= measure_latency(large, some, n_repeats=1, n_warmup=MEMBER_BENCH_WARMUP)
    return measured


def _large_models(plan: Plan, models: Sequence[Model], scratch: Path) -> dict[str, "TextModel"]:
    """Export one member per encoder variant as a fast float32 graph: its folds differ in their weights only.

    A variant answers with all its folds, the ensemble with all its encoder members; TF-IDF members, which take a
    fraction of a millisecond, keep no model to be timed. Members reused from saved logits have no weights.
    """
    import onnx

    from emodistill.benchmarks.latency import GraphModel, ModelChain
    from emodistill.export.bundle import build_fast

    folders: dict[str, Path] = {}
    counts: dict[str, int] = {}
    for member in plan.finished_members:
        if _is_encoder(member):
            name = member.variant.name
            counts[name] = counts.get(name, 0) + 1
            if (member.folder / "weights.safetensors").is_file():
                folders.setdefault(name, member.folder)
    graphs: dict[str, TextModel] = {}
    for name, folder in folders.items():
        path = scratch / f"{name}.onnx"
        checkpoint = load_checkpoint(folder)
        onnx.save(build_fast(checkpoint, "fp32"), path)
        graphs[name] = GraphModel(path, folder, max_length_tokens=checkpoint.max_length_tokens)
    chains: dict[str, TextModel] = {name: ModelChain([model] * counts[name]) for name, model in graphs.items()}
    if chains and graphs.keys() == counts.keys():
        combined = [member.variant.name for member in plan.combined_members if _is_encoder(member)]
        chains[ENSEMBLE] = ModelChain([graphs[name] for name in combined])
    return chains


def _referee_step(step: Mapping[str, Any]) -> "RefereeStep":
    from emodistill.benchmarks.tradeoff import RefereeStep

    gain = step["gain"] or {}
    return RefereeStep(
        name=step["name"],
        kept=step["kept"],
        score=step["score"],
        difference=gain.get("difference"),
        low=gain.get("low"),
        high=gain.get("high"),
        reason=step["reason"],
    )


# ---------------------------------------------------------------- the copy that is committed


def copy_results(plan: Plan, target: Path) -> list[Path]:
    """Copy what is small: config.json, tradeoff.json, the ensemble's weights and thresholds, logits and submissions.

    Parameters
    ----------
    plan : Plan
    target : Path
        Folder, made when missing; files of the same names are replaced, zips and logits that the run no longer has
        are removed.

    Returns
    -------
    list of Path
        The files, sorted.
    """
    run = plan.run
    if not (run.logits_folder / f"{ENSEMBLE}.npz").is_file():
        raise ArtifactError(f"{run.path} has no saved logits: run  emodistill submit {run.path}  first")
    written = []

    def copy(source: Path, place: Path) -> None:
        if source.is_file():
            write_bytes(place, source.read_bytes())
            written.append(place)

    write_json(target / "config.json", _public_config(plan))
    written.append(target / "config.json")
    for name in ("tradeoff.json",):
        copy(run.report_folder / name, target / name)
    for name in ("combination.json", "member_weights.json", "metrics.json", "thresholds.json"):
        copy(run.ensemble_folder / name, target / name)
    for folder, pattern in ((run.logits_folder, "*.npz"), (run.submissions_folder, "*.zip")):
        for old in (target / folder.name).glob(pattern):
            if not (folder / old.name).is_file():
                old.unlink()
        for source in sorted(folder.glob(pattern)):
            copy(source, target / folder.name / source.name)
    return sorted(written)


def copy_students(plan: Plan, target: Path) -> list[Path]:
    """Copy each exported student to a folder of its own, so that it can be exported again without training.

    A folder gets config.json, tokenizer.json, float16 weights in files of at most 24 MB, the logits and submissions of
    the float32 student and of its int8 graph, verification.json, and what a second training said about itself.

    Parameters
    ----------
    plan : Plan
    target : Path
        Gets a folder per student; files of the same names are replaced.

    Returns
    -------
    list of Path
        The files, sorted.

    Raises
    ------
    ArtifactError
        If no student of the run has been exported and its logits saved.
    """
    run = plan.run
    saved = sorted(path.stem.removesuffix("-int8") for path in run.logits_folder.glob("*-int8.npz"))
    exported = [name for name in saved if run.student_folder(name).is_dir()]
    if not exported:
        raise ArtifactError(
            f"{run.path} has no exported student with saved logits: run  emodistill run --out {run.path}  first"
        )
    for name in exported:
        folder, student = target / name, run.student_folder(name)
        save_checkpoint(folder, load_checkpoint(student), dtype="float16", max_file_bytes=MOST_BYTES_OF_A_FILE)
        copies = {
            folder / "verification.json": run.bundle_folder(name) / "verification.json",
            **{folder / file: student / file for file in ("compression.json", "activation_ranges.json")},
        }
        for precision in ("fp32", "int8"):
            copies[folder / f"logits-{precision}.npz"] = run.logits_folder / f"{name}-{precision}.npz"
            copies[folder / f"submission-{precision}.zip"] = run.submissions_folder / f"{name}-{precision}.zip"
        for place, source in copies.items():
            if source.is_file():
                write_bytes(place, source.read_bytes())
    return sorted(path for name in exported for path in (target / name).iterdir())


def _public_config(plan: Plan) -> dict[str, Any]:
    """Return what made the results, without paths of this machine."""
    run = plan.run
    settings = run.settings.to_dict()
    for table in (*settings["variants"], *settings["students"]):
        if "encoder" in table:
            table["encoder"] = Path(table["encoder"]).name if Path(table["encoder"]).is_dir() else table["encoder"]
    return {
        "settings": settings,
        "variants": {
            variant.name: {**variant.fingerprint_parts(), "encoder": Path(variant.encoder).name}
            if Path(variant.encoder).is_dir()
            else variant.fingerprint_parts()
            for variant in plan.variants
        },
        "data": {
            name: {"file": Path(entry["path"]).name, "fingerprint": entry["fingerprint"]}
            for name, entry in run.data_record.items()
        },
        "label_names": list(run.data.label_names),
        "members": [member.name for member in plan.finished_members],
        "seconds": dict(run.seconds),
        "versions": run.versions,
    }
