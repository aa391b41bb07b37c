"""A bundle from a small checkpoint: what is in it, who can read it, and what is refused."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from tiny_checkpoints import CASES, LABEL_NAMES, make_checkpoint, write_checkpoint

onnx = pytest.importorskip("onnx")
pytest.importorskip("tensorflow")
pytest.importorskip("tf2onnx")

from emodistill.checkpoints import load_checkpoint  # noqa: E402
from emodistill.distill.compression import input_names  # noqa: E402
from emodistill.errors import ConfigError, InputError, VerificationError  # noqa: E402
from emodistill.export.bundle import ExportSettings, build_fast, export_bundle, write_minimal_bundle  # noqa: E402
from emodistill.export.portable import KerasReference  # noqa: E402
from emodistill.export.verification import VerificationLimits  # noqa: E402
from emodistill.runtime import Classifier  # noqa: E402
from emodistill.thresholds import decide, sigmoid  # noqa: E402
from emodistill.tokenization import encode, load_tokenizer  # noqa: E402

WORDS = ("thank", "you", "thanks", "so", "sorry", "good", "ok", "haha", "that", "joke", "the", "old", "goat", "love")
LENIENT = VerificationLimits(
    int8_mean_logit_difference=1.0,
    int8_max_logit_difference=5.0,
    changed_decision_share=0.2,
    micro_f1_loss=1.0,
    latency_ratio=100.0,
)


def _texts(n):
    rng = np.random.default_rng(4)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(n)]


TEXTS = _texts(120)


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("student") / "student", make_checkpoint())


@pytest.fixture(scope="module")
def labels(checkpoint_dir):
    """What the model itself says at another threshold, with some noise: F1 is high and not 1."""
    checkpoint = load_checkpoint(checkpoint_dir)
    ids = encode(load_tokenizer(checkpoint_dir), TEXTS, checkpoint.max_length_tokens)
    probabilities = sigmoid(KerasReference(checkpoint).logits(ids))
    noise = np.random.default_rng(2).random(probabilities.shape) < 0.05
    return (decide(probabilities, 0.6) ^ noise).astype(np.int8)


@pytest.fixture(scope="module")
def exported(checkpoint_dir, labels, tmp_path_factory):
    bundle_dir = tmp_path_factory.mktemp("bundles") / "tiny"
    report = export_bundle(
        checkpoint_dir,
        bundle_dir,
        held_out_texts=TEXTS,
        held_out_labels=labels,
        settings=ExportSettings(limits=LENIENT, n_latency_texts=10),
        card={"title": "A small one", "license": "apache-2.0", "Data": "Made up."},
    )
    return bundle_dir, report


def test_files_and_manifest(exported):
    bundle_dir, _ = exported
    files = {path.relative_to(bundle_dir).as_posix() for path in bundle_dir.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "config.json",
        "emodistill.json",
        "manifest.json",
        "onnx/model.onnx",
        "onnx/model_fast.onnx",
        "onnx/model_quantized.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
        "verification.json",
    }
    listed = json.loads((bundle_dir / "manifest.json").read_text())["files"]
    assert set(listed) == files - {"manifest.json"}
    for name, entry in listed.items():
        assert hashlib.sha256((bundle_dir / name).read_bytes()).hexdigest() == entry["sha256"]
    assert [path.name for path in bundle_dir.parent.iterdir()] == ["tiny"]  # nothing is left beside it


def test_labels_have_their_names_everywhere(exported):
    bundle_dir, _ = exported
    config = json.loads((bundle_dir / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert [config["id2label"][str(i)] for i in range(7)] == list(LABEL_NAMES)
    assert [config["label2id"][name] for name in LABEL_NAMES] == list(range(7))
    settings = json.loads((bundle_dir / "emodistill.json").read_text())
    assert settings["label_names"] == list(LABEL_NAMES)
    for name, entry in settings["graphs"].items():
        metadata = {p.key: p.value for p in onnx.load(bundle_dir / name).metadata_props}
        assert json.loads(metadata["label_names"]) == list(LABEL_NAMES)
        assert json.loads(metadata["thresholds"]) == entry["thresholds"]
        assert metadata["max_length_tokens"] == "48"
        assert metadata["precision"] == entry["precision"]
    assert all(name in (bundle_dir / "README.md").read_text() for name in LABEL_NAMES)


def test_default_is_the_fast_graph_with_fixed_scales(exported):
    bundle_dir, report = exported
    settings = json.loads((bundle_dir / "emodistill.json").read_text())
    assert settings["default_graph"] == report["default_graph"] == "onnx/model_fast.onnx"
    graphs = settings["graphs"]
    assert {name: (g["precision"], g["batchable"], g["portable"]) for name, g in graphs.items()} == {
        "onnx/model.onnx": ("fp32", True, True),
        "onnx/model_quantized.onnx": ("int8-dynamic", False, True),
        "onnx/model_fast.onnx": ("int8-static", True, False),
    }
    assert report["fast_precisions_tried"] == {"int8-static": []}
    assert report["graphs"]["onnx/model.onnx"]["max_logit_difference"] < 1e-4


def test_thresholds_belong_to_each_graph(exported, labels):
    bundle_dir, report = exported
    for name in report["graphs"]:
        classifier = Classifier.load(bundle_dir, graph=name, threads=1)
        thresholds = classifier.thresholds
        assert len(set(thresholds.tolist())) == 1  # shared by the labels
        # labels were drawn at 0.6; a threshold lies between two probabilities that occur, never on one
        assert 0.5 < thresholds[0] < 0.7
        assert not np.isin(thresholds, classifier.predict_proba(TEXTS)).any()
        entry = report["graphs"][name]
        low, high = entry["micro_f1_interval"]
        assert 0.8 < low <= entry["micro_f1"] <= high < 1.0


def test_classifier_answers_as_the_gate_measured(exported, checkpoint_dir):
    bundle_dir, report = exported
    checkpoint = load_checkpoint(checkpoint_dir)
    keras = KerasReference(checkpoint).logits(encode(load_tokenizer(checkpoint_dir), TEXTS, 48))
    for name, entry in report["graphs"].items():
        logits = Classifier.load(bundle_dir, graph=name, threads=1).predict_logits(TEXTS)
        assert np.abs(logits - keras).max() == pytest.approx(entry["max_logit_difference"], abs=1e-4)


def test_tokenizer_of_the_bundle_gives_the_ids_of_training(exported):  # D18, D19
    tokenizer = load_tokenizer(exported[0])
    for case in ("D18_expected.json", "D19_expected.json"):
        expected = json.loads((CASES / case).read_text(encoding="utf-8"))
        for entry in expected:
            assert encode(tokenizer, [entry["text"]], 48)[0].tolist() == entry["ids"], entry


def test_texts_without_tokens_score_alike(exported):  # D20
    texts = [json.loads(line)["text"] for line in (CASES / "D20_empty_texts.jsonl").read_text("utf-8").splitlines()]
    logits = Classifier.load(exported[0], threads=1).predict_logits(texts)
    assert logits.shape == (8, 7)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[:5], np.tile(logits[0], (5, 1)), atol=1e-6)
    assert np.abs(logits[0] - logits[7]).max() > 1e-2


def test_long_texts_are_cut(exported):  # D21
    import csv

    with (CASES / "D21_long.csv").open(encoding="utf-8", newline="") as handle:
        rows = {row["id"]: row["text"] for row in csv.DictReader(handle)}
    scores = Classifier.load(exported[0], threads=1).score(list(rows.values()))
    by_id = dict(zip(rows, scores.logits, strict=True))
    assert np.isfinite(scores.logits).all()
    np.testing.assert_allclose(by_id["words600"], by_id["words600_tail"], atol=1e-6)
    assert scores.cut.any()
    assert not scores.cut.all()


def test_scores_are_sigmoids_of_their_own(exported):  # D26
    texts = [json.loads(line)["text"] for line in (CASES / "D26_two_emotions.jsonl").read_text().splitlines()]
    scores = Classifier.load(exported[0], threads=1).score(texts)
    assert scores.label_names == LABEL_NAMES
    np.testing.assert_allclose(scores.probabilities, 1 / (1 + np.exp(-scores.logits.astype(np.float64))), atol=1e-6)
    assert (np.abs(scores.probabilities.sum(axis=1) - 1) > 0.05).all()


def test_calibration_moves_thresholds_and_probabilities(checkpoint_dir, labels, tmp_path):
    scale, bias = [2.0] * 7, [-0.5] * 7
    settings = ExportSettings(limits=LENIENT, n_latency_texts=4, with_portable=False, fast_precisions=("fp32",))
    common = {"held_out_texts": TEXTS, "held_out_labels": labels, "settings": settings}
    export_bundle(checkpoint_dir, tmp_path / "plain", **common)
    export_bundle(checkpoint_dir, tmp_path / "calibrated", calibration=(scale, bias), **common)
    plain, calibrated = (Classifier.load(tmp_path / name, threads=1) for name in ("plain", "calibrated"))
    logits = plain.predict_logits(TEXTS)
    np.testing.assert_allclose(calibrated.predict_proba(TEXTS), sigmoid(2 * logits - 0.5), atol=1e-6)
    assert calibrated.predict(TEXTS) == plain.predict(TEXTS)  # a rising function of the logits changes no best decision
    logit = np.log(plain.thresholds[0] / (1 - plain.thresholds[0]))
    assert calibrated.thresholds[0] == pytest.approx(sigmoid(2 * logit - 0.5), abs=2e-3)
    assert abs(calibrated.thresholds[0] - plain.thresholds[0]) > 0.01
    metadata = {p.key: p.value for p in onnx.load(tmp_path / "calibrated/onnx/model_fast.onnx").metadata_props}
    assert json.loads(metadata["calibration_scale"]) == scale


def test_a_precision_that_fails_is_not_the_default_and_the_report_says_why(checkpoint_dir, labels, tmp_path):
    strict = VerificationLimits(
        int8_mean_logit_difference=1e-9, changed_decision_share=1.0, micro_f1_loss=1.0, latency_ratio=100.0
    )
    report = export_bundle(
        checkpoint_dir,
        tmp_path / "strict",
        held_out_texts=TEXTS,
        held_out_labels=labels,
        settings=ExportSettings(limits=strict, n_latency_texts=4),
    )
    assert report["default_graph"] == "onnx/model.onnx"
    assert set(report["fast_precisions_tried"]) == {"int8-static", "int8-dynamic"}
    reason = report["graphs"]["onnx/model_fast.onnx"]["failed"][0]
    assert reason.startswith("the mean logit difference to Keras (in standard deviations) is ")
    assert reason in (tmp_path / "strict" / "README.md").read_text()
    assert json.loads((tmp_path / "strict" / "verification.json").read_text())["limits"]["latency_ratio"] == 100.0
    assert Classifier.load(tmp_path / "strict").graph_name == "onnx/model.onnx"


def test_without_any_passing_graph_nothing_is_written(checkpoint_dir, tmp_path):
    strict = VerificationLimits(int8_mean_logit_difference=1e-9)
    with pytest.raises(VerificationError, match="no graph of the bundle passes its limits"):
        export_bundle(
            checkpoint_dir,
            tmp_path / "none",
            held_out_texts=TEXTS,
            settings=ExportSettings(limits=strict, with_portable=False, n_latency_texts=4),
        )
    assert not (tmp_path / "none").exists()


def test_full_range_weights_are_not_made_the_default(checkpoint_dir, labels, tmp_path):
    settings = ExportSettings(limits=LENIENT, n_latency_texts=4, weight_bits=8, fast_precisions=("int8-static",))
    report = export_bundle(
        checkpoint_dir, tmp_path / "full", held_out_texts=TEXTS, held_out_labels=labels, settings=settings
    )
    assert report["default_graph"] == "onnx/model.onnx"
    assert report["graphs"]["onnx/model_fast.onnx"]["failed"][0].startswith("weights reach 127")


def test_an_earlier_bundle_is_replaced_whole(exported, checkpoint_dir, tmp_path):
    target = tmp_path / "bundle"
    shutil.copytree(exported[0], target)
    (target / "old.txt").write_text("left over")
    settings = ExportSettings(limits=LENIENT, n_latency_texts=4, with_portable=False, fast_precisions=("fp32",))
    export_bundle(checkpoint_dir, target, held_out_texts=TEXTS, settings=settings)
    assert not (target / "old.txt").exists()
    assert not (target / "onnx/model.onnx").exists()
    assert Classifier.load(target).thresholds.tolist() == [0.5] * 7  # no labels: nothing to search on


def test_ranges_from_training_are_the_graphs_ranges(checkpoint_dir, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(checkpoint_dir, student)
    checkpoint = load_checkpoint(student)
    names = {name for group in input_names(checkpoint.config, checkpoint.pooling).values() for name in group}
    (student / "activation_ranges.json").write_text(json.dumps({name: [-5.0, 46.0] for name in names}))
    settings = ExportSettings(
        limits=LENIENT, n_latency_texts=4, with_portable=False, fast_precisions=("int8-static", "fp32")
    )
    export_bundle(student, tmp_path / "b", held_out_texts=TEXTS, settings=settings)
    graph = onnx.load(tmp_path / "b/onnx/model_fast.onnx").graph
    scales = {t.name: onnx.numpy_helper.to_array(t).item() for t in graph.initializer if t.name.endswith(".scale")}
    zeros = {t.name: onnx.numpy_helper.to_array(t).item() for t in graph.initializer if t.name.endswith(".zero_point")}
    assert {name.removesuffix(".scale") for name in scales} <= names
    assert len(scales) >= 4 * checkpoint.config.n_layers
    np.testing.assert_allclose(list(scales.values()), 51 / 255, rtol=1e-6)
    assert set(zeros.values()) == {25}


def test_given_thresholds_are_kept(checkpoint_dir, tmp_path):
    settings = ExportSettings(limits=LENIENT, n_latency_texts=4, with_portable=False, fast_precisions=("fp32",))
    given = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    export_bundle(checkpoint_dir, tmp_path / "b", held_out_texts=TEXTS, settings=settings, thresholds=given)
    np.testing.assert_allclose(Classifier.load(tmp_path / "b").thresholds, given, atol=1e-7)


def test_bad_arguments(checkpoint_dir, tmp_path):
    with pytest.raises(InputError, match="1 held-out texts"):
        export_bundle(checkpoint_dir, tmp_path / "b", held_out_texts=["one"])
    with pytest.raises(InputError, match=r"held-out labels have shape \(2, 3\), expected \(2, 7\)"):
        export_bundle(
            checkpoint_dir, tmp_path / "b", held_out_texts=["a", "b"], held_out_labels=np.zeros((2, 3), np.int8)
        )
    with pytest.raises(InputError, match="thresholds has 1 numbers, expected 7"):
        export_bundle(checkpoint_dir, tmp_path / "b", held_out_texts=["a", "b"], thresholds=[0.5])
    with pytest.raises(ConfigError, match="choose at least one of int8-static, int8-dynamic, fp32"):
        ExportSettings(fast_precisions=("int3",))


def test_labels_keep_the_order_of_the_checkpoint(checkpoint_dir):
    checkpoint = load_checkpoint(checkpoint_dir)
    model = build_fast(checkpoint, "fp32")
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_array_equal(stored["classifier.weight"], checkpoint.weights["classifier.weight"])


def test_a_minimal_bundle_answers_as_the_whole_one(exported, tmp_path):
    bundle_dir, _ = exported
    small = write_minimal_bundle(bundle_dir, tmp_path / "app" / "model")
    files = {path.relative_to(small).as_posix() for path in small.rglob("*") if path.is_file()}
    default = json.loads((bundle_dir / "emodistill.json").read_text())["default_graph"]
    assert files == {default, "config.json", "tokenizer.json", "emodistill.json", "manifest.json"}
    np.testing.assert_array_equal(
        Classifier.load(small).predict_proba(TEXTS[:9]), Classifier.load(bundle_dir).predict_proba(TEXTS[:9])
    )
