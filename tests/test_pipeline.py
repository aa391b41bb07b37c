"""The whole job on a tiny encoder: what is made, what is made again, what is reused, and what a kill leaves behind."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_runs import LABEL_NAMES, WORDS, write_inputs, write_rows

from emodistill import Classifier
from emodistill.artifacts import END_MARK_NAME, read_json
from emodistill.checkpoints import load_checkpoint
from emodistill.cli import main
from emodistill.cli.planning import Plan
from emodistill.cli.run_folder import RunFolder
from emodistill.ensemble.referee import RULES
from emodistill.ensemble.variants import VariantConfig
from emodistill.logits import read_member_logits, read_model_logits
from emodistill.thresholds import decide, sigmoid

MODELS = ("bert", "words", "ensemble", "tiny-fp32", "tiny-int8")


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 2
    return result.stderr


def states(run: Path) -> dict[str, str]:
    summary = json.loads(call("run", "--out", run, "--dry-run", "--json").stdout)
    return {row["name"]: row["state"] for row in summary["stages"]}


def times(run: Path) -> dict[str, int]:
    """Return when each piece was published."""
    return {str(mark.parent.relative_to(run)): mark.stat().st_mtime_ns for mark in run.rglob(END_MARK_NAME)}


def read_submission(path: Path) -> list[list[str]]:
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["submission.csv"]
        return list(csv.reader(io.StringIO(archive.read("submission.csv").decode())))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that was made in one go; tests copy it before they change it."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    call("run", "--out", run, "--config", inputs / "run.toml")
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def published(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("results") / "whole"
    call("publish", finished, target)
    return target


# ---------------------------------------------------------------- one go


def test_a_run_leaves_every_piece(finished: Path) -> None:
    expected = {
        *(f"members/{name}-fold{fold}" for name in ("bert", "words") for fold in (0, 1)),
        *("ensemble", "students/tiny", "bundles/tiny", "report", "logits", "submissions"),
    }
    assert set(times(finished)) == expected
    assert {path.stem for path in (finished / "logits").glob("*.npz")} == set(MODELS)
    zips = {path.stem for path in (finished / "submissions").glob("*.zip")}
    assert zips == {*MODELS, *(f"ensemble-{rule}" for rule in RULES)}
    assert not list(finished.rglob("*.part"))
    assert not list(finished.rglob("checkpoint.*"))
    assert not [path for path in finished.rglob("*") if path.suffix in (".pkl", ".pickle", ".h5", ".bin")]


def test_every_artefact_names_the_labels_in_the_order_of_the_header(finished: Path) -> None:
    # D14: joy, anger, calm is neither sorted nor the order of a set
    names = list(LABEL_NAMES)
    thresholds = read_json(finished / "ensemble/thresholds.json")
    assert list(thresholds["thresholds"]) == names
    assert read_json(finished / "ensemble/member_weights.json")["label_names"] == names
    assert list(read_json(finished / "ensemble/metrics.json")["scores"]["dev"]["per_label"]) == names
    assert read_json(finished / "report/tradeoff.json")["label_names"] == names
    assert read_json(finished / "bundles/tiny/emodistill.json")["label_names"] == names
    config = read_json(finished / "bundles/tiny/config.json")
    assert [config["id2label"][str(i)] for i in range(3)] == names
    for model in MODELS:
        assert read_model_logits(finished / f"logits/{model}.npz").label_names == LABEL_NAMES
    assert read_submission(finished / "submission.zip")[0] == ["text", *names]


def test_every_train_row_is_out_of_fold_and_no_member_saw_its_own(finished: Path) -> None:
    run = RunFolder.open(finished)
    for variant in ("bert", "words"):
        model = read_model_logits(finished / f"logits/{variant}.npz")
        assert np.isfinite(model.oof).all()
        np.testing.assert_array_equal(model.fold_ids, run.fold_ids)
        for fold in (0, 1):
            member = read_member_logits(finished / f"members/{variant}-fold{fold}/logits.npz")
            np.testing.assert_array_equal(member.valid_rows, np.flatnonzero(run.fold_ids == fold))
            np.testing.assert_array_equal(model.oof[member.valid_rows], member.valid)
            np.testing.assert_array_equal(model.by_fold["test"][fold], member.evaluations["test"])
        # The average is of float16 logits, kept as float16: off by half a step of the largest, 2**-11 of it.
        mean = model.by_fold["test"].mean(axis=0)
        np.testing.assert_allclose(model.averages["test"], mean, atol=float(np.abs(mean).max()) * 2**-11)


def test_submissions_can_be_worked_out_from_the_saved_logits(finished: Path) -> None:
    thresholds = list(read_json(finished / "ensemble/thresholds.json")["thresholds"].values())
    logits = read_model_logits(finished / "logits/ensemble.npz").averages["test"]
    expected = decide(sigmoid(logits), thresholds)
    rows = read_submission(finished / "submission.zip")[1:]
    np.testing.assert_array_equal(np.array([row[1:] for row in rows], dtype=int), expected)
    texts = [row[0] for row in csv.reader((RunFolder.open(finished).paths.test or Path()).open())][1:]
    assert [row[0] for row in rows] == texts  # the input's row order
    assert (finished / "submission.zip").read_bytes() == (finished / "submissions/ensemble.zip").read_bytes()


def test_the_int8_submission_is_what_the_classifier_answers(finished: Path) -> None:
    classifier = Classifier.load(finished / "bundles/tiny", graph="model_fast")
    rows = read_submission(finished / "submissions/tiny-int8.zip")[1:]
    logits = read_model_logits(finished / "logits/tiny-int8.npz").averages["test"]
    answered = classifier.predict_logits([row[0] for row in rows])
    np.testing.assert_allclose(logits, answered, atol=float(np.abs(answered).max()) * 2**-10)
    decisions = np.array([row[1:] for row in rows], dtype=int)
    surely = np.abs(sigmoid(answered) - classifier.thresholds) > 0.002  # not moved by the rounding to float16
    assert surely.mean() > 0.5
    np.testing.assert_array_equal(decisions[surely], decide(sigmoid(answered), classifier.thresholds)[surely])


def test_a_student_is_judged_on_rows_it_was_not_trained_on(finished: Path) -> None:
    for name in ("tiny-fp32", "tiny-int8"):
        model = read_model_logits(finished / f"logits/{name}.npz")
        held_out = model.fold_ids == 0
        assert 0 < held_out.sum() <= 12  # about a tenth of 60
        assert np.isfinite(model.oof[held_out]).all()
        assert np.isnan(model.oof[~held_out]).all()


def test_the_table_has_every_model_with_score_latency_and_size(finished: Path) -> None:
    report = read_json(finished / "report/tradeoff.json")
    rows = {row["name"]: row for row in report["models"]}
    assert list(rows)[-5:] == list(MODELS)
    assert report["scored_on"] == "dev.csv"
    for name in ("bert", "ensemble", "tiny-fp32", "tiny-int8"):
        assert rows[name]["latency"]["with_tokenizing"]["p50_ms"] > 0
        assert rows[name]["size_bytes"] > 0
    graph = finished / "bundles/tiny/onnx/model_fast.onnx"
    assert rows["tiny-int8"]["size_bytes"] == graph.stat().st_size
    table = (finished / "report/table.txt").read_text()
    assert all(name in table for name in MODELS)
    assert table in call("bench", finished).stdout + "\n"


def test_test_labels_are_placeholders_that_change_nothing(finished: Path) -> None:
    text = json.dumps([read_json(finished / "report/tradeoff.json"), read_json(finished / "ensemble/metrics.json")])
    assert '"test"' not in text
    assert "test.csv" not in text


def test_every_verb_ends_with_json_for_programs(finished: Path) -> None:
    for verb in ("train", "combine", "distill", "export", "bench", "submit", "inspect"):
        assert isinstance(json.loads(call(verb, finished, "--json").stdout), dict)


def test_inspecting_names_the_members_and_labels(finished: Path) -> None:
    text = call("inspect", finished).stdout
    assert all(name in text for name in (*LABEL_NAMES, "bert", "words"))


def test_the_help_of_combine_names_every_rule() -> None:
    words = call("combine", "--help").stdout.replace(".", " ").replace(",", " ").split()
    assert set(RULES) <= set(words)


# ---------------------------------------------------------------- again


def test_a_second_run_makes_nothing(run: Path) -> None:
    before = times(run)
    assert set(states(run).values()) == {"done"}
    call("run", "--out", run)
    assert times(run) == before


def test_only_what_depends_on_a_changed_setting_is_made_again(run: Path) -> None:
    before = times(run)
    call("combine", run, "--rule", "shared_plug_in")
    after = times(run)
    assert {name for name in after if after[name] != before[name]} == {"ensemble"}
    assert read_json(run / "ensemble/thresholds.json")["rule"] == "shared_plug_in"
    now = states(run)
    assert {name for name, state in now.items() if state == "stale"} == {
        "student tiny",
        "bundle tiny",
        "report",
        "logits",
        "submissions",
    }
    assert "student tiny is stale (made from other settings or inputs): run  emodistill distill" in refused(
        "export", run
    )


def test_another_bench_setting_makes_the_report_alone_stale(run: Path) -> None:
    before = times(run)
    call("run", "--out", run, "--set", "bench.n_texts=4")
    after = times(run)
    assert {name for name in after if after[name] != before[name]} == {"report"}


def test_other_members_make_the_ensemble_stale_and_a_dry_run_says_so(run: Path) -> None:
    summary = json.loads(call("run", "--out", run, "--seed", "5", "--dry-run", "--json").stdout)
    assert {row["state"] for row in summary["stages"]} == {"stale"}
    assert read_json(run / "run.json")["settings"]["seed"] == 0  # a dry run changes nothing


def test_a_changed_data_file_is_refused_until_it_is_accepted(run: Path, inputs: Path, tmp_path: Path) -> None:
    record = read_json(run / "run.json")
    dev = Path(shutil.copy(inputs / "dev.csv", tmp_path / "dev.csv"))
    record["data"]["dev"]["path"] = str(dev)
    (run / "run.json").write_text(json.dumps(record))
    assert set(states(run).values()) == {"done"}
    write_rows(dev, 20, 9)
    assert f"the dev file {dev} has changed since this run read it" in refused("combine", run)
    dev.unlink()
    assert f"the dev file {dev} of this run is gone" in refused("combine", run)


@pytest.mark.parametrize("damage", ["cut to 60 %", "emptied", "removed", "no end mark"])
def test_a_damaged_member_is_seen_and_trained_again_to_the_same_numbers(run: Path, damage: str) -> None:
    folder = run / "members/words-fold1"
    file = folder / (END_MARK_NAME if damage == "no end mark" else "logits.npz")
    whole = (folder / "logits.npz").read_bytes()
    if damage in ("removed", "no end mark"):
        file.unlink()
    else:
        file.write_bytes(whole[: len(whole) * 6 // 10] if damage == "cut to 60 %" else b"")
    assert states(run)["words fold 1"] == "damaged"
    result = call("train", run, "--only", "words")
    assert "words fold 1: " in result.stderr
    assert (folder / "logits.npz").read_bytes() == whole
    assert set(states(run).values()) == {"done"}  # and nothing after it became stale


def test_members_can_be_trained_one_by_one_and_combined_so_far(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = ("--config", inputs / "run.toml")
    assert "no finished member" in refused_after_begin(run, *config)
    call("train", run, "--only", "words", "--folds", "1")
    assert states(run) | {"words fold 1": "done", "words fold 0": "missing"} == states(run)
    result = call("combine", run)
    assert "combining without words fold 0: not made yet" in result.stderr
    oof = read_model_logits(run / "ensemble/oof.npz")
    known = np.isfinite(oof.oof).all(axis=1)
    np.testing.assert_array_equal(known, oof.fold_ids == 1)
    assert "30 train rows have no out-of-fold prediction" in refused("distill", run)


def write_teacher(path: Path, inputs: Path, *names: str) -> Path:
    """Write a teacher that knows the words: logit 3 where one of a label's words occurs, else -3."""
    with path.open("w") as handle:
        handle.write(f"text,{','.join(LABEL_NAMES)}\n")
        for name in names:
            with (inputs / name).open(newline="") as rows:
                for text in dict.fromkeys(row["text"] for row in csv.DictReader(rows)):
                    knows = [any(word in text.split() for word in WORDS[label]) for label in LABEL_NAMES]
                    handle.write(f"{text},{','.join('3.0' if known else '-3.0' for known in knows)}\n")
    return path


def test_students_learn_from_anybodys_logits(inputs: Path, tmp_path: Path) -> None:
    run, teacher = tmp_path / "run", write_teacher(tmp_path / "teacher.csv", inputs, "train.csv", "unlabeled.csv")
    result = call("distill", run, "--config", inputs / "run.toml", "--teacher-logits", teacher)
    assert "teacher: teacher.csv, 60 train rows and 10 of unlabeled text" in result.stderr
    assert (run / "students/tiny/weights.safetensors").is_file()
    before = times(run)
    call("distill", run)  # it is remembered, and nothing is left to do
    assert times(run) == before
    call("export", run)
    assert "the logits in teacher.csv" in (run / "bundles/tiny/README.md").read_text()
    assert "no finished member" in refused("distill", run, "--teacher-logits", "ensemble")
    lacking = write_teacher(tmp_path / "lacking.csv", inputs, "unlabeled.csv")
    sentence = refused("distill", run, "--teacher-logits", lacking)
    assert "of the 60 train rows; the first that it lacks is row 1, text" in sentence
    teacher.unlink()
    assert "is gone: put it back" in refused("export", run)


def test_a_variant_waits_for_its_second_fold(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    call("train", run, "--config", inputs / "run.toml", "--only", "words")
    call("train", run, "--only", "bert", "--folds", "0")
    result = call("combine", run)
    assert "combining without bert fold 0: its variant has no second fold yet" in result.stderr
    assert "combining without bert fold 1: not made yet" in result.stderr
    assert read_json(run / "ensemble/combination.json")["member_names"] == ["words"]
    assert np.isfinite(read_model_logits(run / "ensemble/oof.npz").oof).all()


def refused_after_begin(run: Path, *config: object) -> str:
    """Begin a run by training nothing of it."""
    call("train", run, *config, "--only", "words", "--folds", "0")
    shutil.rmtree(run / "members")
    return refused("combine", run)


def test_members_on_a_frozen_encoder_share_one_embedding(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emodistill.ensemble import members

    calls, embed = [], members.embed_member_texts

    def counted(variant: VariantConfig, *arguments: object) -> dict[str, np.ndarray]:
        calls.append(variant.name)
        return embed(variant, *arguments)

    monkeypatch.setattr(members, "embed_member_texts", counted)
    table = f'kind="head", encoder="{inputs / "encoder"}", precision="float32"'
    variants = (
        f'variants=[{{name="frozen", {table}}}, {{name="again", {table}}}, {{name="first", {table}, pooling="cls"}}]'
    )
    run = tmp_path / "run"
    call("train", run, "--config", inputs / "run.toml", "--set", variants, "--set", "students=[]")
    assert calls == ["frozen", "first"]  # once per way of embedding, not per fold or variant
    assert all((folder / END_MARK_NAME).is_file() for folder in (run / "embeddings").iterdir())
    logits = {name: read_member_logits(run / f"members/{name}-fold1/logits.npz") for name in ("frozen", "again")}
    assert (logits["frozen"].valid != logits["again"].valid).any()  # other seeds
    shutil.rmtree(run / "members/frozen-fold1")
    call("train", run)
    assert len(calls) == 2
    same = read_member_logits(run / "members/frozen-fold1/logits.npz")
    np.testing.assert_array_equal(same.valid, logits["frozen"].valid)
    for name in ("dev", "test", "unlabeled"):
        np.testing.assert_array_equal(same.evaluations[name], logits["frozen"].evaluations[name])
    call("combine", run)
    call("bench", run)  # a head has no weights of its own to time
    rows = {row["name"]: row for row in read_json(run / "report/tradeoff.json")["models"]}
    assert rows["frozen"]["size_bytes"] is None


def test_without_dev_the_scores_are_on_rows_that_no_model_saw(inputs: Path, tmp_path: Path) -> None:
    final = tmp_path / "final"
    cheap = ("--set", 'variants=[{name="words", kind="tfidf"}]', "--set", "students=[]")
    call("run", "--out", final, "--config", inputs / "run.toml", "--use-dev", *cheap)
    assert len(RunFolder.open(final).data.train_texts) == 60 + 20
    metrics = read_json(final / "ensemble/metrics.json")
    assert metrics["scores"]["dev"] is None
    assert metrics["dev_by_rule"] == {}
    report = read_json(final / "report/tradeoff.json")
    assert report["scored_on"] == "train rows that no model saw"
    assert any("the final members were trained on dev too" in note for note in report["notes"])
    rows = {row["name"]: row for row in report["models"]}
    assert list(rows) == ["all negative", "words", "ensemble"]  # a baseline that saw the rows has no score on them
    assert rows["ensemble"]["micro_f1"] == pytest.approx(metrics["scores"]["out-of-fold"]["micro_f1"], abs=1e-6)
    assert rows["words"]["n_rows"] == 80
    assert rows["ensemble"]["size_bytes"] is None


# ---------------------------------------------------------------- elsewhere


def test_published_students_answer_again_and_have_no_path_of_this_machine(
    finished: Path, inputs: Path, tmp_path: Path
) -> None:
    result = call("publish", finished, tmp_path / "results", "--students", tmp_path / "students")
    assert f"{tmp_path / 'students'}: 8 files" in result.stdout
    student = load_checkpoint(tmp_path / "students/tiny")
    for name, array in load_checkpoint(finished / "students/tiny").weights.items():
        np.testing.assert_allclose(student.weights[name], array, atol=2e-3, rtol=1e-3)
    assert (tmp_path / "students/tiny/weights.safetensors").stat().st_size < (
        finished / "students/tiny/weights.safetensors"
    ).stat().st_size
    for name in ("logits-fp32.npz", "logits-int8.npz"):
        source = finished / "logits" / name.replace("logits", "tiny")
        assert (tmp_path / "students/tiny" / name).read_bytes() == source.read_bytes()
    for path in (tmp_path / "students").rglob("*.json"):
        assert str(inputs) not in path.read_text()
        assert str(finished) not in path.read_text()


def test_published_results_hold_the_small_files_and_no_path_of_this_machine(published: Path, inputs: Path) -> None:
    names = {path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()}
    assert {"config.json", "tradeoff.json", "thresholds.json", "member_weights.json", "metrics.json"} <= names
    assert {f"logits/{model}.npz" for model in MODELS} <= names
    assert {f"submissions/{model}.zip" for model in MODELS} <= names
    assert not [name for name in names if name.endswith((".safetensors", ".onnx", END_MARK_NAME))]
    for path in published.glob("*.json"):
        assert str(inputs) not in path.read_text()
        assert str(inputs.parent) not in path.read_text()


def test_reused_results_rebuild_the_same_ensemble_without_training(
    finished: Path, published: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a member was trained")

    monkeypatch.setattr("emodistill.ensemble.members.train_member", never)
    again = tmp_path / "again"
    plan = call("run", "--out", again, "--config", inputs / "run.toml", "--reuse", published, "--dry-run", "--json")
    assert [row["state"] for row in json.loads(plan.stdout)["stages"]][:4] == ["reused"] * 4
    result = call("train", again, "--config", inputs / "run.toml", "--reuse", published)
    assert result.stderr.count(f"reused from {published}") == 4
    call("combine", again)
    for name in ("thresholds.json", "member_weights.json", "metrics.json"):
        assert (again / "ensemble" / name).read_bytes() == (finished / "ensemble" / name).read_bytes()
    before, after = (read_model_logits(run / "ensemble/oof.npz") for run in (finished, again))
    np.testing.assert_array_equal(before.oof, after.oof)
    np.testing.assert_array_equal(before.averages["test"], after.averages["test"])
    call("bench", again)  # reused members have no weights to time
    rows = {row["name"]: row for row in read_json(again / "report/tradeoff.json")["models"]}
    assert rows["bert"]["latency"] is None
    assert rows["bert"]["size_bytes"] is None


def test_members_of_another_run_folder_are_reused_too(finished: Path, inputs: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    result = call("train", again, "--config", inputs / "run.toml", "--reuse", finished, "--only", "words")
    assert result.stderr.count(f"reused from {finished}") == 2


def test_what_does_not_match_is_not_reused_and_says_why(published: Path, inputs: Path, tmp_path: Path) -> None:
    arguments = ("--config", inputs / "run.toml", "--reuse", published, "--only", "words")
    other_seed = call("train", tmp_path / "a", *arguments, "--seed", "3")
    assert f"words fold 0: not reused ({published}: its settings differ)" in other_seed.stderr
    variants = 'variants=[{name="words", kind="tfidf", seed=1}]'  # the same member, under another split
    other_split = call("train", tmp_path / "b", *arguments, "--seed", "3", "--set", variants)
    assert f"words fold 0: not reused ({published}: its folds were split otherwise)" in other_split.stderr
    write_rows(tmp_path / "train.csv", 60, 77)
    other_rows = call("train", tmp_path / "c", *arguments, "--train", tmp_path / "train.csv")
    assert f"not reused ({published}: its train rows differ (60 there, 60 here))" in other_rows.stderr
    message = refused("train", tmp_path / "d", "--config", inputs / "run.toml", "--reuse", inputs)
    assert "has neither a folder 'logits' nor a folder 'members'" in message


# ---------------------------------------------------------------- the same numbers


def test_two_processes_agree_and_another_seed_differs(finished: Path, inputs: Path, tmp_path: Path) -> None:
    # D12: folds exactly, scores to 1e-6; here the saved logits are equal to the bit
    only = ("--config", str(inputs / "run.toml"), "--only", "bert", "--folds", "0")
    command = [sys.executable, "-m", "emodistill.cli", "train", str(tmp_path / "same"), *only]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    call("train", tmp_path / "other", *only, "--set", "seed=9")
    whole, same, other = (RunFolder.open(path) for path in (finished, tmp_path / "same", tmp_path / "other"))
    np.testing.assert_array_equal(whole.fold_ids, same.fold_ids)
    assert (whole.fold_ids != other.fold_ids).any()
    name = "members/bert-fold0/logits.npz"
    a, b, c = (read_member_logits(run.path / name) for run in (whole, same, other))
    np.testing.assert_array_equal(a.valid, b.valid)
    np.testing.assert_array_equal(a.evaluations["test"], b.evaluations["test"])
    assert not np.array_equal(a.evaluations["test"], c.evaluations["test"])


def test_members_trained_side_by_side_are_those_of_one_by_one(finished: Path, inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "side"
    call("train", run, "--config", inputs / "run.toml", "--set", "training_processes=2")
    for fold in (0, 1):
        for name in ("bert", "words"):
            member = f"members/{name}-fold{fold}/logits.npz"
            expected, found = read_member_logits(finished / member), read_member_logits(run / member)
            np.testing.assert_allclose(found.valid, expected.valid, atol=2e-3)
    seconds = read_json(run / "run.json")["seconds"]
    assert {"bert fold 0", "bert fold 1", "words fold 0", "words fold 1"} <= set(seconds)


def test_a_killed_run_ends_with_the_numbers_of_an_unbroken_one(finished: Path, inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "emodistill.cli", "train", run, "--config", inputs / "run.toml"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run / "members/bert-fold0" / END_MARK_NAME).is_file():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    names = [member.name for member in Plan(RunFolder.open(run)).finished_members]
    assert "bert fold 0" in names
    assert "words fold 1" not in names
    call("train", run)
    call("combine", run)
    for name in ("thresholds.json", "member_weights.json", "metrics.json"):
        assert read_json(run / "ensemble" / name) == read_json(finished / "ensemble" / name)
    for name in ("bert-fold0", "bert-fold1", "words-fold1"):
        before, after = (read_member_logits(folder / f"members/{name}/logits.npz") for folder in (finished, run))
        np.testing.assert_array_equal(before.valid, after.valid)
        np.testing.assert_array_equal(before.evaluations["test"], after.evaluations["test"])
