"""Classifier: right numbers, the same in any company and order; clear words for what it cannot load."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the train extra to write graphs")

from bundles import (
    CASES,
    LABEL_NAMES,
    VOCABULARY,
    expected_logits,
    graph_settings,
    write_bundle,
    write_graph,
    write_settings,
    write_tokenizer,
)
from onnx import TensorProto

from emodistill import runtime
from emodistill.errors import ArtifactError, ConfigError, InputError
from emodistill.runtime import Classifier, usable_cores

CLS, SEP = VOCABULARY.index("[CLS]"), VOCABULARY.index("[SEP]")
GRAPHS = ("model_fast", "model")


def jsonl(name: str) -> list[dict]:
    return [json.loads(line) for line in (CASES / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def own_bundle(tmp_path) -> Path:
    """A bundle that the test may damage."""
    return write_bundle(tmp_path / "bundle")


@pytest.fixture(scope="module")
def mixed_texts() -> list[str]:
    return [record["text"] for record in jsonl("D24_mixed_lengths.jsonl")]


def one_graph_bundle(folder: Path, *, batchable: bool, settings: dict | None = None, **graph) -> Path:
    write_tokenizer(folder)
    write_graph(folder / "onnx/model.onnx", **graph)
    write_settings(folder, {"onnx/model.onnx": graph_settings(batchable=batchable, **(settings or {}))})
    return folder


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("graph", GRAPHS)
def test_scores_are_those_worked_out_by_hand(bundle, graph):
    # [CLS] thank you [SEP] and [CLS] sorry [SEP]: lengths differ, so a batch with padding could not hide.
    thank, you, sorry = (VOCABULARY.index(piece) for piece in ("thank", "you", "sorry"))
    expected = np.stack([expected_logits([CLS, thank, you, SEP]), expected_logits([CLS, sorry, SEP])])
    classifier = Classifier.load(bundle, graph=graph)
    texts = ["thank you", "sorry"]
    logits = classifier.predict_logits(texts)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    probabilities = classifier.predict_proba(texts)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-expected)), atol=1e-6)
    assert classifier.predict(texts) == [["gratitude"], ["remorse"]]


def test_calibration_scales_and_shifts_each_logit(tmp_path):
    scale, bias = [1, 1, 0.5, 1, 1, 1, 2], [0, 0, 1, 0, 0, 0, -3]
    settings = {"calibration_scale": scale, "calibration_bias": bias}
    classifier = Classifier.load(one_graph_bundle(tmp_path, batchable=True, settings=settings))
    expected = np.array(scale) * expected_logits([CLS, VOCABULARY.index("sorry"), SEP]) + bias
    np.testing.assert_allclose(classifier.predict_proba(["sorry"])[0], 1 / (1 + np.exp(-expected)), atol=1e-6)
    # The logits stay the graph's own.
    np.testing.assert_allclose(
        classifier.predict_logits(["sorry"])[0], expected_logits([CLS, VOCABULARY.index("sorry"), SEP]), atol=1e-5
    )


def test_a_probability_equal_to_the_threshold_is_positive(tmp_path):
    folder = one_graph_bundle(tmp_path, batchable=True)
    probabilities = Classifier.load(folder).predict_proba(["you"])[0]
    write_settings(folder, {"onnx/model.onnx": graph_settings(batchable=True, thresholds=probabilities.tolist())})
    assert Classifier.load(folder).predict(["you"]) == [list(LABEL_NAMES)]
    above = np.nextafter(probabilities, np.float32(1)).tolist()
    write_settings(folder, {"onnx/model.onnx": graph_settings(batchable=True, thresholds=above)})
    assert Classifier.load(folder).predict(["you"]) == [[]]


def test_each_graph_brings_its_own_thresholds(own_bundle):
    settings = json.loads((own_bundle / "emodistill.json").read_text())
    settings["graphs"]["onnx/model.onnx"]["thresholds"] = [0.9] * 7
    (own_bundle / "emodistill.json").write_text(json.dumps(settings))
    assert Classifier.load(own_bundle).thresholds.tolist() == [0.5] * 7
    thresholds = Classifier.load(own_bundle, graph="model").thresholds
    assert thresholds.dtype == np.float32
    assert thresholds.tolist() == [np.float32(0.9)] * 7


@pytest.mark.parametrize("graph", GRAPHS)
def test_d26_names_and_independent_labels(bundle, graph):
    classifier = Classifier.load(bundle, graph=graph)
    texts = [record["text"] for record in jsonl("D26_two_emotions.jsonl")]
    assert classifier.label_names == LABEL_NAMES
    # Text 2 has one "thank" and one "sorry" among 13 tokens: each brings 50 / 13 = 3.8, against a bias of -3.
    assert classifier.predict(texts) == [["gratitude", "love"], ["gratitude", "remorse"], []]
    probabilities = classifier.predict_proba(texts)
    assert (probabilities[1][[2, 6]] > 0.5).all()
    assert (np.abs(probabilities.sum(axis=1) - 1) > 0.05).all()


@pytest.mark.parametrize("graph", GRAPHS)
def test_no_texts_give_no_rows(bundle, graph):
    classifier = Classifier.load(bundle, graph=graph)
    assert classifier.predict([]) == []
    assert classifier.predict_proba([]).shape == (0, 7)


# ---------------------------------------------------------------- inputs of the graph (D22)


@pytest.mark.parametrize("id_type", [TensorProto.INT32, TensorProto.INT64])
@pytest.mark.parametrize("mask_type", [None, TensorProto.INT32, TensorProto.INT64, TensorProto.FLOAT])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("batchable", [False, True])
def test_d22_the_graph_gets_exactly_the_inputs_it_declares(tmp_path, id_type, mask_type, segments, batchable):
    classifier = Classifier.load(
        one_graph_bundle(tmp_path, batchable=batchable, id_type=id_type, mask_type=mask_type, segments=segments)
    )
    for record in jsonl("D22_batches.jsonl"):
        token_ids = [ids.tolist() for ids in runtime.encode(classifier._tokenizer, record["texts"], 128)]
        expected = [expected_logits(ids) for ids in token_ids]
        np.testing.assert_allclose(classifier.predict_logits(record["texts"]), expected, atol=1e-4)


def test_an_input_nobody_knows_is_refused(tmp_path):
    folder = one_graph_bundle(tmp_path, batchable=True)
    rename_in_graph(folder / "onnx/model.onnx", "attention_mask", "position_ids")
    with pytest.raises(ArtifactError, match="wants an input 'position_ids'"):
        Classifier.load(folder)


def rename_in_graph(path: Path, old: str, new: str) -> None:
    import onnx

    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.name = new if value.name == old else value.name
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = new if name == old else name
    onnx.save(model, path)


def test_a_frozen_length_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="symbolic batch and sequence"):
        Classifier.load(one_graph_bundle(tmp_path, batchable=True, sequence=128))


def test_a_graph_without_logits_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no output 'logits'"):
        Classifier.load(one_graph_bundle(tmp_path, batchable=True, output="scores"))


def test_a_graph_of_other_labels_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"gives 6 logits where emodistill\.json names 7 labels"):
        Classifier.load(one_graph_bundle(tmp_path, batchable=True, n_labels=6))


# ---------------------------------------------------------------- neighbours, order, threads (D13, D24)


def test_a_graph_that_minds_neighbours_sees_none(tmp_path):
    """The graph adds the largest id of the call: any neighbour or padding token with a larger id would show."""
    classifier = Classifier.load(one_graph_bundle(tmp_path, batchable=False, minds_neighbours=True), threads=4)
    texts = ["thank you", "😂 👍", "sorry", ".", "", "good fine ok bad"] * 20
    alone = np.concatenate([classifier.predict_logits([text]) for text in texts])
    np.testing.assert_array_equal(classifier.predict_logits(texts), alone)
    thank, you = VOCABULARY.index("thank"), VOCABULARY.index("you")
    np.testing.assert_allclose(alone[0], expected_logits([CLS, thank, you, SEP]) + you, atol=1e-5)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("threads", [1, 3])
def test_d13_rows_stay_in_their_order(bundle, mixed_texts, graph, threads):
    classifier = Classifier.load(bundle, graph=graph, threads=threads)
    alone = np.concatenate([classifier.predict_logits([text]) for text in mixed_texts])
    for size in (1, 7, 32):
        parts = [classifier.predict_logits(mixed_texts[i : i + size]) for i in range(0, len(mixed_texts), size)]
        np.testing.assert_allclose(np.concatenate(parts), alone, atol=1e-5)
    shuffled = np.random.default_rng(0).permutation(len(mixed_texts))
    np.testing.assert_allclose(
        classifier.predict_logits([mixed_texts[i] for i in shuffled]), alone[shuffled], atol=1e-5
    )


@pytest.mark.parametrize("graph", GRAPHS)
def test_long_lists_are_worked_in_chunks(bundle, mixed_texts, monkeypatch, graph):
    monkeypatch.setattr(runtime, "TEXTS_PER_CHUNK", 10)
    monkeypatch.setattr(runtime, "TOKENS_PER_CALL", 20)
    classifier = Classifier.load(bundle, graph=graph, threads=2)
    sizes = []
    original = classifier._run
    monkeypatch.setattr(classifier, "_run", lambda ids: sizes.append(ids.shape) or original(ids))
    alone = np.concatenate([classifier.predict_logits([text]) for text in mixed_texts])
    sizes.clear()
    np.testing.assert_allclose(classifier.predict_logits(mixed_texts), alone, atol=1e-5)
    assert sum(rows for rows, _ in sizes) == len(mixed_texts)
    assert all(rows == 1 or (graph == "model" and rows * tokens <= 20) for rows, tokens in sizes)


def test_equal_lengths_share_a_call(bundle, monkeypatch):
    classifier = Classifier.load(bundle, graph="model")
    shapes = []
    original = classifier._run
    monkeypatch.setattr(classifier, "_run", lambda ids: shapes.append(ids.shape) or original(ids))
    classifier.predict(["thank you", "ok", "love you", "sorry", "good", ""])
    assert shapes == [(1, 2), (3, 3), (2, 4)]


@pytest.mark.parametrize("graph", GRAPHS)
def test_d24_sixteen_threads_get_the_sequential_answers(bundle, mixed_texts, graph):
    classifier = Classifier.load(bundle, graph=graph, threads=2)
    assert len(mixed_texts) == 64
    expected = [classifier.predict_logits([text]) for text in mixed_texts]
    expected_together = classifier.predict_logits(mixed_texts)
    faults: list[object] = []
    start = threading.Barrier(16)

    def ask(thread: int) -> None:
        try:
            start.wait()
            for i in range(thread, 50 * 64, 16):
                if not np.array_equal(classifier.predict_logits([mixed_texts[i % 64]]), expected[i % 64]):
                    faults.append(i)
            if not np.array_equal(classifier.predict_logits(mixed_texts), expected_together):
                faults.append("together")
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


# ---------------------------------------------------------------- hostile texts (D18 to D21)


@pytest.mark.parametrize("graph", GRAPHS)
def test_d20_texts_without_tokens(bundle, graph):
    records = jsonl("D20_empty_texts.jsonl")
    scores = Classifier.load(bundle, graph=graph).score([record["text"] for record in records])
    assert np.isfinite(scores.logits).all()
    for row in range(5):  # only the two end tokens
        np.testing.assert_allclose(scores.logits[row], expected_logits([CLS, SEP]), atol=1e-5)
    assert scores.without_tokens.tolist() == [True] * 5 + [False] * 3
    assert not scores.cut.any()


@pytest.mark.parametrize("graph", GRAPHS)
def test_d21_long_texts_are_cut_and_counted(tmp_path, graph):
    import csv

    with (CASES / "D21_long.csv").open(encoding="utf-8", newline="") as handle:
        rows = {row["id"]: row["text"] for row in csv.DictReader(handle)}
    classifier = Classifier.load(write_bundle(tmp_path, max_length_tokens=512), graph=graph)
    scores = classifier.score(list(rows.values()))
    at = {row_id: i for i, row_id in enumerate(rows)}
    assert np.isfinite(scores.logits).all()
    np.testing.assert_array_equal(scores.logits[at["words600"]], scores.logits[at["words600_tail"]])
    # words510 fills the 512 exactly: at the limit, and not cut.
    cut = {row_id for row_id, i in at.items() if scores.cut[i]}
    assert cut == {"chars10000", "words600", "words600_tail"}
    np.testing.assert_allclose(
        scores.logits[at["word101"]], expected_logits([CLS, VOCABULARY.index("[UNK]"), SEP]), atol=1e-5
    )


def test_special_tokens_and_accents_as_in_training(bundle):
    classifier = Classifier.load(bundle)
    for name in ("D18_expected.json", "D19_expected.json"):
        for case in json.loads((CASES / name).read_text(encoding="utf-8")):
            np.testing.assert_allclose(
                classifier.predict_logits([case["text"]])[0], expected_logits(case["ids"]), atol=1e-5
            )


def test_odd_strings_get_finite_scores(bundle):
    texts = ["\x00", "thank\x00you", "\ud83d", "a" * 100_000, "\u202e", "​" * 50]
    assert np.isfinite(Classifier.load(bundle).predict_proba(texts)).all()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("thank you", "texts is a single string: put it in a list"),
        (b"thank you", "texts is a single string"),
        (["ok", None], r"texts\[1\] is a NoneType, not a string"),
        ([float("nan")], r"texts\[0\] is a float"),
        (3, "texts is a int: give a list of strings"),
    ],
)
def test_texts_that_are_none_are_refused(bundle, texts, message):
    with pytest.raises(InputError, match=message):
        Classifier.load(bundle).predict(texts)


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("name", [None, "onnx/model_fast.onnx", "model_fast.onnx", "model_fast"])
def test_graphs_are_found_by_long_and_short_name(bundle, name):
    assert Classifier.load(bundle, graph=name).graph_name == "onnx/model_fast.onnx"


def test_an_unknown_graph_lists_the_known(bundle):
    with pytest.raises(ConfigError, match="no graph 'fp8': choose one of 'model_fast', 'model'"):
        Classifier.load(bundle, graph="fp8")


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_odd_numbers_of_threads_are_refused(bundle, threads):
    with pytest.raises(ConfigError, match="threads is"):
        Classifier.load(bundle, threads=threads)


def change_settings(folder: Path, **changes: object) -> None:
    settings = json.loads((folder / "emodistill.json").read_text())
    (folder / "emodistill.json").write_text(json.dumps(settings | changes))


def change_graph(folder: Path, **changes: object) -> None:
    settings = json.loads((folder / "emodistill.json").read_text())
    settings["graphs"]["onnx/model_fast.onnx"] |= changes
    (folder / "emodistill.json").write_text(json.dumps(settings))


def cut_graph(folder: Path) -> None:
    path = folder / "onnx/model_fast.onnx"
    path.write_bytes(path.read_bytes()[:300])


DAMAGES = {
    "no settings": (lambda f: (f / "emodistill.json").unlink(), "is no bundle: it has no emodistill.json"),
    "no folder": (shutil.rmtree, "does not exist"),
    "settings cut": (lambda f: (f / "emodistill.json").write_text('{"format"'), "emodistill.json cannot be read"),
    "settings a list": (lambda f: (f / "emodistill.json").write_text("[]"), "is of format None"),
    "later format": (
        lambda f: change_settings(f, format=2),
        "is of format 2, this version",
    ),
    "no thresholds": (lambda f: change_graph(f, thresholds=None), "is damaged"),
    "few thresholds": (
        lambda f: change_graph(f, thresholds=[0.5]),
        "thresholds needs one finite number",
    ),
    "half calibration": (lambda f: change_graph(f, calibration_scale=[1] * 7), "only one is given"),
    "no graph file": (lambda f: (f / "onnx/model_fast.onnx").unlink(), "model_fast.onnx is missing"),
    "graph cut": (cut_graph, "model_fast.onnx cannot be loaded"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "the bundle's tokenizer cannot be used"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_bundle_is_named(own_bundle, name):
    damage, message = DAMAGES[name]
    damage(own_bundle)
    with pytest.raises(ArtifactError, match=message):
        Classifier.load(own_bundle)


def test_without_a_path_the_bundle_of_the_package_is_used(bundle, monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "DEFAULT_BUNDLE", bundle)
    assert Classifier.load().predict(["sorry"]) == [["remorse"]]
    monkeypatch.setattr(runtime, "DEFAULT_BUNDLE", tmp_path / "absent")
    with pytest.raises(ArtifactError, match="came without a default model: give the path of a bundle"):
        Classifier.load()


# ---------------------------------------------------------------- cores (D25)


def write_files(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


V2 = {"proc/self/cgroup": "0::/app/worker\n"}
V1 = {"proc/self/cgroup": "3:cpuset:/\n2:cpu,cpuacct:/docker/abc\n0::/\n"}
QUOTAS = {
    "no control groups": ({}, 64),
    "v2 without limit": (V2 | {"sys/fs/cgroup/app/worker/cpu.max": "max 100000\n"}, 64),
    "v2 two cores": (V2 | {"sys/fs/cgroup/app/worker/cpu.max": "200000 100000\n"}, 2),
    "v2 three and a half": (V2 | {"sys/fs/cgroup/app/worker/cpu.max": "350000 100000\n"}, 3),
    "v2 half a core": (V2 | {"sys/fs/cgroup/app/worker/cpu.max": "50000 100000\n"}, 1),
    "v2 limit above": (
        V2 | {"sys/fs/cgroup/app/worker/cpu.max": "max 100000", "sys/fs/cgroup/app/cpu.max": "400000 100000"},
        4,
    ),
    "v2 seen from inside": (V2 | {"sys/fs/cgroup/cpu.max": "100000 50000\n"}, 2),
    "v1 own group": (
        V1
        | {
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "50000\n",
        },
        3,
    ),
    "v1 seen from inside": (
        V1 | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
        2,
    ),
    "v1 without limit": (
        V1 | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
        64,
    ),
    "rubbish": (V2 | {"sys/fs/cgroup/app/worker/cpu.max": "many\n"}, 64),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_d25_quota_of_the_control_group(tmp_path, monkeypatch, name):
    files, expected = QUOTAS[name]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert usable_cores(write_files(tmp_path, files)) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no processor affinity")
def test_d25_affinity_limits_threads_of_a_real_process(bundle):
    code = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from emodistill import Classifier; c = Classifier.load(sys.argv[1], graph='model'); c.predict(['ok'] * 100);"
        "print(c.threads, len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self/task') else 1)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=True)
    threads, tasks = map(int, done.stdout.split())
    assert threads == 1
    assert done.stderr == ""  # no affinity errors
    assert tasks <= 3  # this thread, and what libraries start for themselves


# ---------------------------------------------------------------- start-up


def test_the_first_answer_comes_quickly(bundle):
    """Process start to first answer: under 600 ms of processor time, which a busy machine does not stretch."""
    code = (
        "import sys, time; from emodistill import Classifier;"
        "print(Classifier.load(sys.argv[1]).predict(['sorry']), time.process_time())"
    )
    used_s = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=True)
        answer, seconds = done.stdout.rsplit(" ", 1)
        assert answer == "[['remorse']]"
        used_s.append(float(seconds))
    assert min(used_s) < 0.6, used_s
