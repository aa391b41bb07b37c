"""The command line: help that costs nothing, errors as one sentence, locks, and runs that can be stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from tiny_runs import write_inputs

from emodistill import __version__
from emodistill.artifacts import FolderLock
from emodistill.cli import main
from emodistill.errors import InputError, TrainingError

VERBS = ("run", "train", "combine", "distill", "export", "bench", "submit", "publish", "inspect")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "emodistill.cli", *map(str, arguments)]

    def heed_interrupts() -> None:  # a shell starts background jobs with SIGINT ignored, and that is inherited
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, preexec_fn=heed_interrupts, **pipes)


def test_the_help_lists_every_command_and_shows_the_whole_job() -> None:
    text = call("--help").output
    for name in (*VERBS, "check", "predict", "encoder"):
        assert f"\n  {name} " in text
    assert "emodistill run --train train.csv" in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    result = call(verb, "--help")
    assert result.exit_code == 0
    assert "--json" in result.output
    assert len(result.output.splitlines()) > 7


def test_the_version_is_told() -> None:
    assert call("--version").output.strip() == f"emodistill, version {__version__}"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["predict", "--help"]])
def test_help_loads_no_training_library(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from emodistill.cli import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "heavy = {'tensorflow', 'tf_keras', 'sklearn', 'transformers', 'onnx', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (InputError("rows.csv has no column 'text'"), 2, "emodistill: rows.csv has no column 'text'\n"),
        (TrainingError("the loss is nan"), 1, "emodistill: the loss is nan\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x.csv"),
            1,
            "emodistill: x.csv: No such file or directory\n",
        ),
        (OSError(28, "No space left on device"), 1, "emodistill: No space left on device\n"),
        (KeyboardInterrupt(), 130, "emodistill: stopped\n"),
        (
            ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow"),
            2,
            "emodistill: this needs 'tensorflow', which is not installed: run  pip install 'emodistill[train]'\n",
        ),
        (
            ModuleNotFoundError("No module named 'pyarrow.csv'", name="pyarrow.csv"),
            2,
            "emodistill: this needs 'pyarrow', which is not installed: run  pip install 'emodistill[parquet]'\n",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, exit_code: int, message: str
) -> None:
    @click.command()
    def broken() -> None:
        raise error

    monkeypatch.setattr(type(main), "get_command", lambda self, ctx, name: broken)
    result = CliRunner().invoke(main, ["broken"])
    assert (result.exit_code, result.stderr, result.stdout) == (exit_code, message, "")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def broken() -> None:
        raise ModuleNotFoundError("No module named 'emodistill.typo'", name="emodistill.typo")

    monkeypatch.setattr(type(main), "get_command", lambda self, ctx, name: broken)
    with pytest.raises(ModuleNotFoundError):
        CliRunner().invoke(main, ["broken"], catch_exceptions=False)


def test_a_command_that_does_not_exist_is_refused() -> None:
    result = call("trian")
    assert result.exit_code == 2
    assert "No such command 'trian'" in result.stderr


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("run", "publish")])
def test_a_folder_that_is_no_run_is_refused(verb: str, tmp_path: Path) -> None:
    result = call(verb, tmp_path / "nothing")
    assert result.exit_code == 2
    assert "no run" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "nothing").exists()


def test_a_file_that_is_not_there_is_named_before_anything_is_made(tmp_path: Path) -> None:
    result = call("run", "--out", tmp_path / "r", "--train", tmp_path / "absent.csv")
    assert result.exit_code == 2
    assert "absent.csv does not exist" in result.stderr
    assert not (tmp_path / "r").exists()


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    config = write_inputs(tmp_path / "in")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "letter.txt").write_text("dear")
    result = call("run", "--out", tmp_path / "r", "--config", config)
    assert result.exit_code == 2
    assert "is not empty and is no run folder" in result.stderr
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "sed=1"], "setting 'sed' is unknown"),
        (["--set", "combine.metric=accuracy"], "metric 'accuracy' is unknown"),
        (["--set", "combine.metric=label:hate"], "names no label: choose one of  joy, anger, calm"),
        (["--only", "bart"], "variant 'bart' is unknown: this run has bert, words"),
        (["--folds", "7"], "fold 7 is unknown: this run has 0 to 1"),
        (["--folds", "a"], "--folds a is not a list of numbers"),
    ],
)
def test_a_wrong_choice_is_named_before_any_work(tmp_path: Path, arguments: list[str], message: str) -> None:
    config = write_inputs(tmp_path / "in")
    result = call("train", tmp_path / "r", "--config", config, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "r" / "members").exists()


def test_a_dry_run_lists_what_is_missing_and_changes_nothing(tmp_path: Path) -> None:
    config = write_inputs(tmp_path / "in")
    result = call("run", "--out", tmp_path / "r", "--config", config, "--dry-run", "--json")
    summary = json.loads(result.stdout)
    names = [row["name"] for row in summary["stages"]]
    assert names[:4] == ["bert fold 0", "bert fold 1", "words fold 0", "words fold 1"]
    assert names[4:] == ["ensemble", "student tiny", "bundle tiny", "report", "logits", "submissions"]
    assert {row["state"] for row in summary["stages"]} == {"missing"}
    assert summary["unknown"] == ["bert fold 0", "bert fold 1", "student tiny"]  # an encoder nobody has timed
    assert not (tmp_path / "r").exists()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    config = write_inputs(tmp_path / "in")
    with FolderLock(tmp_path / "r"):
        result = call("train", tmp_path / "r", "--config", config, "--only", "words")
    assert result.exit_code == 2
    assert f"in use by another run (process {os.getpid()})" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    config = write_inputs(tmp_path / "in", epochs=100_000)
    process = start("train", tmp_path / "r", "--config", config, "--only", "bert", "--folds", "0")
    log = tmp_path / "r" / "members" / ".bert-fold0.part" / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not (log.is_file() and log.stat().st_size):  # the training loop runs
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert errors.splitlines()[-1] == (
        f"emodistill: stopped; everything finished so far is kept, go on with  emodistill run --out {tmp_path / 'r'}"
    )
    assert "Traceback" not in errors
