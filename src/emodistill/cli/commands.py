"""The verbs that work on a run folder: each reads its arguments, calls the pipeline and shows what came out."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click

from emodistill.cli.settings import PRESETS, load_settings, parse_override, read_data_paths
from emodistill.errors import ConfigError, EmodistillError

__all__ = ["bench", "combine", "distill", "embed", "export", "inspect", "publish", "run", "submit", "train"]

Command = TypeVar("Command", bound=Callable[..., Any])

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)


class StoppedRun(EmodistillError):
    """The user or the system ended the run; what is finished is kept."""

    exit_code = 130


# ---------------------------------------------------------------- options that several verbs share


def _data_options(command: Command) -> Command:
    for option in reversed(
        [
            click.option("--train", "train_path", type=FILE, help="Labelled rows to learn from."),
            click.option("--dev", "dev_path", type=FILE, help="Labelled rows that are scored and never tuned on."),
            click.option("--test", "test_path", type=FILE, help="Rows to predict for a submission."),
            click.option("--unlabeled", "unlabeled_path", type=FILE, help="More texts, for the student."),
            click.option("--preset", type=click.Choice(list(PRESETS)), help="How much to spend.  [default: standard]"),
            click.option("--config", "config_path", type=FILE, help="TOML file of settings; changes the preset."),
            click.option("--seed", type=click.IntRange(min=0), help="Of folds, members and students."),
            click.option("--use-dev", is_flag=True, help="Train the members on train + dev; then no dev score."),
            click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Change one setting."),
            click.option(
                "--reuse",
                "reuse_folders",
                type=FOLDER,
                multiple=True,
                help="Results or run folder whose saved logits stand for members that match.",
            ),
        ]
    ):
        command = option(command)
    return command


def _json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON line instead of tables.")(command)


RUN_ARGUMENT = click.argument("folder", metavar="RUN", type=FOLDER)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else ()


def _fold_numbers(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(name) for name in _names(text))
    except ValueError as error:
        raise ConfigError(f"--folds {text} is not a list of numbers: write for example  --folds 0,1") from error


# ---------------------------------------------------------------- the whole job


@click.command(short_help="From files to a verified bundle and a submission; goes on where it stood.")
@_data_options
@click.option("--out", "folder", type=FOLDER, required=True, help="Run folder, new or to go on with.")
@click.option("--dry-run", is_flag=True, help="Say what would be done and about how long it takes.")
@_json_option
def run(folder: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Do the whole job: train members, combine, distil, export, measure, write the submission.

    Only what is missing or was made from other settings or files is done; a run that was stopped goes on when the
    command is given again, and  emodistill run --out RUN  is enough for that.

    \b
      emodistill run --train T.csv --dev D.csv --test X.csv --out runs/first --preset fast
      emodistill run --train T.csv --dev D.csv --out runs/first --dry-run
      emodistill run --train T.csv --test X.csv --out runs/again --reuse benchmarks/results/best

    The dev file is scored and nothing is chosen on it; labels in the test file are placeholders and are not read.
    """
    from emodistill.cli import pipeline

    started = _begin(folder, **options)
    if dry_run:
        _show(pipeline.describe_plan(started), as_json)
        return
    with _working_on(folder):
        _show(pipeline.run_all(started), as_json)


# ---------------------------------------------------------------- one stage at a time


@click.command(short_help="Train the members: each variant on all folds but one.")
@RUN_ARGUMENT
@_data_options
@click.option("--only", metavar="VARIANTS", help="Comma-separated names; by default all.")
@click.option("--folds", metavar="FOLDS", help="Comma-separated numbers; by default all.")
@click.option("--dry-run", is_flag=True, help="Say what would be done and about how long it takes.")
@_json_option
def train(folder: Path, only: str | None, folds: str | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Train the members of a run that are missing or stale, or some of them.

    \b
      emodistill train runs/first
      emodistill train runs/first --only mpnet --folds 0,1
      emodistill train runs/new --train T.csv --dev D.csv --config best.toml --only mpnet

    Where cores and memory allow, members are trained side by side, each on its share of the cores
    (--set training_processes=1 trains one at a time).

    Settings of a variant, in a TOML file under [[variants]]: name, kind ("encoder", "tfidf" or "head"), encoder, seed,
    epochs, batch_size, learning_rate, warmup_fraction, weight_decay, layerwise_decay, clip_norm, dropout_rate,
    attention_dropout_rate, classifier_dropout_rate, joined_texts, pooling, max_length_tokens, precision, folds.
    """
    from emodistill.cli import pipeline

    started = _begin(folder, **options)
    names, numbers = _names(only), _fold_numbers(folds)
    if dry_run:
        _show(pipeline.describe_plan(started, stage="train", only=names, folds=numbers), as_json)
        return
    with _working_on(folder):
        _show(pipeline.train(started, only=names, folds=numbers), as_json)


@click.command(short_help="Weigh the members and choose thresholds on out-of-fold rows.")
@RUN_ARGUMENT
@click.option("--metric", help="What to maximise: micro_f1, macro_f1, label:NAME, f_beta:B.")
@click.option("--rule", help="Take this rule whatever its interval says; 'auto' leaves the choice to the referee.")
@_json_option
def combine(folder: Path, metric: str | None, rule: str | None, as_json: bool) -> None:
    """Combine the members that are there, with weights and thresholds learned on out-of-fold rows alone.

    A step away from the plain average is kept only if the paired 95 % interval of its gain lies above 0 and the gain is
    worth it. Rules, from simple to less so: uniform, uniform_probabilities, shared_plug_in, shared_searched,
    per_label_thresholds, greedy_weights, shared_weights, per_label_weights. A variant that was trained on some folds
    only takes part; rows it did not predict are left out.
    Metric and rule are remembered: the next  emodistill run  keeps them.
    """
    _run_stage(folder, "combine", as_json, {"combine.metric": metric, "combine.rule": rule})


@click.command(short_help="Teach students to answer like the ensemble.")
@RUN_ARGUMENT
@click.option("--only", metavar="STUDENTS", help="Comma-separated names; by default all.")
@click.option("--teacher-logits", metavar="FILE", help="Learn from these in place of the run's ensemble.")
@click.option(
    "--teacher-scale",
    type=click.Choice(["logits", "probabilities"]),
    help="What the numbers of the teacher's file are.  [default: logits, if not all lie within 0 and 1]",
)
@_data_options
@_json_option
def distill(
    folder: Path, only: str | None, teacher_logits: str | None, teacher_scale: str | None, as_json: bool, **options: Any
) -> None:
    """Train the students of a run on the ensemble's out-of-fold predictions and on unlabeled text.

    \b
      emodistill distill runs/first --only tiny
      emodistill distill runs/other --train T.csv --unlabeled U.csv --teacher-logits teacher.parquet

    A teacher's file may come from any framework: CSV, TSV, JSONL or Parquet with a column id or text and one column per
    label, or npz with arrays logits, ids (or texts) and label_names. It must know every train row, best by a model that
    was not trained on it; unlabeled rows that it does not know are left out. The run remembers it;
    --teacher-logits ensemble goes back to the run's own.
    """
    from emodistill.cli import pipeline

    started = _begin(folder, **options)
    with _working_on(folder):
        _show(
            pipeline.distill(started, only=_names(only), teacher_logits=teacher_logits, teacher_scale=teacher_scale),
            as_json,
        )


@click.command(short_help="Write students as verified ONNX bundles.")
@RUN_ARGUMENT
@click.option("--only", metavar="STUDENTS", help="Comma-separated names; by default all.")
@click.option("--opset", type=int, help="ONNX operator set of the portable graph; by default the latest tested.")
@click.option("--verify-cpu", type=click.Choice(["haswell"]), help="Also answer under an emulated older processor.")
@_json_option
def export(folder: Path, only: str | None, opset: int | None, verify_cpu: str | None, as_json: bool) -> None:
    """Export the students of a run: portable fp32, portable int8 and fused int8, checked before they are written."""
    _run_stage(folder, "export", as_json, {"export.opset": opset, "export.verify_cpu": verify_cpu}, only=_names(only))


@click.command(short_help="Measure latency and write the trade-off report.")
@RUN_ARGUMENT
@click.option("--threads", type=click.IntRange(min=1), help="Threads of one answer.  [default: 1]")
@_json_option
def bench(folder: Path, threads: int | None, as_json: bool) -> None:
    """Measure every model of a run, one text at a time, and put F1, latency and size side by side."""
    _run_stage(folder, "bench", as_json, {"bench.threads": threads})


@click.command(short_help="Write submission.zip, one zip per model, and every model's logits.")
@RUN_ARGUMENT
@_json_option
def submit(folder: Path, as_json: bool) -> None:
    """Write the submissions: RUN/submission.zip is the ensemble's, RUN/submissions/ has one per model."""
    _run_stage(folder, "submit", as_json)


@click.command(short_help="Copy a run's small results, to be committed and reused.")
@RUN_ARGUMENT
@click.argument("target", metavar="DIR", type=FOLDER)
@click.option("--students", type=FOLDER, metavar="DIR", help="Also the students, with float16 weights, to DIR/NAME/.")
@_json_option
def publish(folder: Path, target: Path, students: Path | None, as_json: bool) -> None:
    """Copy config.json, tradeoff.json, thresholds, logits/ and submissions/ of a run to DIR; no members' weights.

    On a new machine  emodistill run ... --reuse DIR  rebuilds everything after training from them.
    """
    _run_stage(folder, "publish", as_json, target=target, students=students)


@click.command(short_help="Copy what an app needs from a bundle: one graph, the tokenizer, JSON.")
@click.argument("bundle", metavar="BUNDLE", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", metavar="DIR", type=FOLDER)
def embed(bundle: Path, target: Path) -> None:
    """Copy the default graph of BUNDLE, its tokenizer and its JSON files to DIR, for shipping inside an application.

    \b
      emodistill embed runs/first/bundles/tiny app/model
    """
    from emodistill.export.bundle import write_minimal_bundle

    write_minimal_bundle(bundle, target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    click.echo(f"{target}: {size / 1e6:.1f} MB")


@click.command(short_help="Look into a run: labels, errors, likely wrong labels, what each member adds.")
@RUN_ARGUMENT
@_json_option
def inspect(folder: Path, as_json: bool) -> None:
    """Show what a run's members know, on the rows they never saw.

    Per label support, precision, recall and F1 with its interval; the most confident wrong rows; likely label errors;
    labels that go together; what each variant is good at; the gain as members are added; how their errors correlate.
    """
    from emodistill.cli import pipeline
    from emodistill.cli.run_folder import RunFolder

    _show(pipeline.inspect(RunFolder.open(folder)), as_json)


# ---------------------------------------------------------------- the ends


def _begin(
    folder: Path,
    *,
    train_path: Path | None,
    dev_path: Path | None,
    test_path: Path | None,
    unlabeled_path: Path | None,
    preset: str | None,
    config_path: Path | None,
    seed: int | None,
    use_dev: bool,
    assignments: tuple[str, ...],
    reuse_folders: tuple[Path, ...],
) -> Any:
    """Begin a run, or go on with one, changing what the options say."""
    from emodistill.cli.run_folder import DataPaths, RunFolder

    overrides = [parse_override(text) for text in assignments]
    overrides += [("seed", seed)] if seed is not None else []
    overrides += [("use_dev", True)] if use_dev else []
    from_file = read_data_paths(config_path) if config_path is not None else {}
    from_flags = {"train": train_path, "dev": dev_path, "test": test_path, "unlabeled": unlabeled_path}
    given = {name: path or from_file.get(name) for name, path in from_flags.items()}
    changes_data = any(path is not None for path in given.values())
    chooses_settings = preset is not None or config_path is not None
    if not RunFolder.exists(folder):
        if given["train"] is None:
            raise ConfigError(f"{folder} is no run yet: begin one with  --train FILE, or [data] in the --config file")
        settings = load_settings(preset, config_path, overrides)
        return RunFolder.create(folder, settings, DataPaths(**_only_given(given)), reuse=list(reuse_folders))
    if not (changes_data or chooses_settings or overrides or reuse_folders):
        return RunFolder.open(folder)
    remembered = RunFolder.remembered(folder)
    if chooses_settings:
        settings = load_settings(preset, config_path, overrides)
    else:
        settings = remembered.settings.changed(overrides)
    if given["train"] is not None:  # a whole new set of files
        paths = DataPaths(**_only_given(given))
    elif changes_data:
        paths = DataPaths(**{**dict(remembered.paths.items()), **_only_given(given)})
    else:
        paths = RunFolder.open(folder).paths
    return RunFolder.create(folder, settings, paths, reuse=list(reuse_folders))


def _only_given(paths: dict[str, Path | None]) -> dict[str, Any]:
    return {name: path for name, path in paths.items() if path is not None}


def _run_stage(
    folder: Path, stage: str, as_json: bool, overrides: dict[str, Any] | None = None, **arguments: Any
) -> None:
    from emodistill.cli import pipeline
    from emodistill.cli.run_folder import RunFolder

    started = RunFolder.open(folder)
    changes = [(name, value) for name, value in (overrides or {}).items() if value is not None]
    if changes:
        started = RunFolder.create(folder, started.settings.changed(changes), started.paths)
    with _working_on(folder):
        _show(getattr(pipeline, stage)(started, **arguments), as_json)


@contextmanager
def _working_on(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; let a termination end the work as Ctrl-C does, with a sentence on how to go on."""
    from emodistill.artifacts import FolderLock

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with FolderLock(folder):
            yield
    except KeyboardInterrupt:
        raise StoppedRun(
            f"stopped; everything finished so far is kept, go on with  emodistill run --out {folder}"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(outcome: Any, as_json: bool) -> None:
    """Print an outcome: its table for people, or one JSON line for programs."""
    if as_json:
        click.echo(json.dumps(outcome.summary, ensure_ascii=False, allow_nan=False))
    else:
        click.echo(outcome.text)
