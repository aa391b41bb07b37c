"""Other people's clients read a bundle as we do. The real ones run where `make peers` has built their environment."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the train extra")

from bundles import LABEL_NAMES, expected_logits, write_bundle

from emodistill.benchmarks.clients import HARD_TEXTS, check_clients, write_cases

ROOT = Path(__file__).resolve().parents[1]
PEERS_PYTHON = Path(os.environ.get("EMODISTILL_PEERS_PYTHON", ROOT / ".venv-peers" / "bin" / "python"))
NODE_FOLDER = Path(os.environ.get("EMODISTILL_PEERS_NODE", ROOT / "benchmarks" / "peers"))


def test_cases_hold_what_the_graph_says_one_text_at_a_time(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", max_length_tokens=16)
    write_cases(bundle, HARD_TEXTS, tmp_path / "cases.json")
    cases = json.loads((tmp_path / "cases.json").read_text())
    assert cases["texts"] == list(HARD_TEXTS)
    assert cases["label_names"] == list(LABEL_NAMES)
    assert max(len(ids) for ids in cases["ids"]) == cases["max_length_tokens"] == 16
    assert sum(len(ids) == 2 for ids in cases["ids"]) >= 4  # texts without a token: both end tokens, nothing else
    assert set(cases["probabilities"]) == {"onnx/model.onnx", "onnx/model_fast.onnx"}
    for rows in cases["probabilities"].values():
        expected = [1 / (1 + np.exp(-expected_logits(ids))) for ids in cases["ids"]]
        np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-6)


def test_a_client_that_cannot_start_does_not_agree(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no module named optimum' >&2\nexit 1\n")
    broken.chmod(0o755)
    report = check_clients(bundle, peers_python=broken)
    assert report == {"optimum-onnx": {"agrees": False, "error": "no module named optimum"}}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle from a two-layer student, written by the exporter."""
    pytest.importorskip("tensorflow", reason="needs the train extra")
    from tiny_checkpoints import make_checkpoint, write_checkpoint

    from emodistill.export.bundle import ExportSettings, export_bundle
    from emodistill.export.verification import VerificationLimits

    folder = tmp_path_factory.mktemp("clients")
    lenient = VerificationLimits(
        int8_mean_logit_difference=1.0,
        int8_max_logit_difference=5.0,
        changed_decision_share=1.0,
        micro_f1_loss=1.0,
        latency_ratio=100.0,
    )
    export_bundle(
        write_checkpoint(folder / "student", make_checkpoint()),
        folder / "bundle",
        held_out_texts=["thank you", "so sorry", "good goat"] * 10,
        settings=ExportSettings(limits=lenient, n_latency_texts=5),
    )
    return folder / "bundle"


@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="needs the peers' environment: make peers")
def test_optimum_in_a_transformers_pipeline_agrees(exported: Path) -> None:
    report = check_clients(exported, peers_python=PEERS_PYTHON)["optimum-onnx"]
    assert report["agrees"], report
    assert report["texts"] == len(HARD_TEXTS)
    assert set(report["max_probability_difference"]) == {"onnx/model.onnx", "onnx/model_quantized.onnx"}


@pytest.mark.skipif(
    not (shutil.which("node") and (NODE_FOLDER / "node_modules").is_dir()), reason="needs Node and: make peers"
)
def test_onnxruntime_node_and_its_pipeline_agree(exported: Path) -> None:
    report = check_clients(exported, node_folder=NODE_FOLDER)["onnxruntime-node"]
    assert report["agrees"], report
    assert len(report["max_probability_difference"]) == 4  # two graphs, each alone and in a pipeline
