"""Small bundles whose answers can be worked out by hand: the mean of one row of numbers per token.

logits = mean over a text's tokens of TABLE[id] + BIAS, plus what a careless caller would add (padding, segments).
"""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from emodistill.tokenization import load_tokenizer

CASES = Path(__file__).parent / "cases"
LABEL_NAMES = ("admiration", "amusement", "gratitude", "love", "pride", "relief", "remorse")
VOCABULARY = (CASES / "D18_vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
BIAS = np.full(len(LABEL_NAMES), -3.0, np.float32)


def make_table() -> np.ndarray:
    """Return float32 (n_pieces, n_labels): small noise, and strong words for some labels."""
    table = np.random.default_rng(7).normal(0, 0.1, (len(VOCABULARY), len(LABEL_NAMES))).astype(np.float32)
    for piece, label in (("thank", "gratitude"), ("thanks", "gratitude"), ("love", "love"), ("sorry", "remorse")):
        table[VOCABULARY.index(piece), LABEL_NAMES.index(label)] = 50.0
    return table


TABLE = make_table()


def expected_logits(ids: list[int]) -> np.ndarray:
    """Work out in float64 what the graph gives for the ids of one text alone."""
    return TABLE[ids].astype(np.float64).mean(axis=0) + BIAS


def write_graph(
    path: Path,
    *,
    id_type: int = TensorProto.INT64,
    mask_type: int | None = TensorProto.INT64,
    segments: bool = False,
    minds_neighbours: bool = False,
    sequence: str | int = "sequence",
    n_labels: int = len(LABEL_NAMES),
    output: str = "logits",
) -> None:
    """Write a graph; one that minds its neighbours adds the largest id of the whole call to every logit."""
    inputs = [helper.make_tensor_value_info("input_ids", id_type, ["batch", sequence])]
    weights = [
        numpy_helper.from_array(TABLE[:, :n_labels], "table"),
        numpy_helper.from_array(BIAS[:n_labels], "bias"),
        numpy_helper.from_array(np.array([2], np.int64), "last"),
        numpy_helper.from_array(np.array([1], np.int64), "middle"),
    ]
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["rows"])]
    if segments:  # segment 1 would move every logit by 100
        inputs.append(helper.make_tensor_value_info("token_type_ids", id_type, ["batch", sequence]))
        weights.append(numpy_helper.from_array(np.array([[0.0], [100.0]], np.float32), "segment_table"))
        nodes.append(helper.make_node("Gather", ["segment_table", "token_type_ids"], ["segment_rows"]))
        nodes.append(helper.make_node("Add", ["rows", "segment_rows"], ["summed_rows"]))
    rows = "summed_rows" if segments else "rows"
    if mask_type is None:
        nodes.append(helper.make_node("ReduceMean", [rows, "middle"], ["mean"], keepdims=0))
    else:
        inputs.append(helper.make_tensor_value_info("attention_mask", mask_type, ["batch", sequence]))
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["mask_column"]),
            helper.make_node("Mul", [rows, "mask_column"], ["real_rows"]),
            helper.make_node("ReduceSum", ["real_rows", "middle"], ["sum"], keepdims=0),
            helper.make_node("ReduceSum", ["mask_column", "middle"], ["count"], keepdims=0),
            helper.make_node("Div", ["sum", "count"], ["mean"]),
        ]
    result = "alone" if minds_neighbours else output
    nodes.append(helper.make_node("Add", ["mean", "bias"], [result]))
    if minds_neighbours:
        nodes += [
            helper.make_node("Cast", ["input_ids"], ["float_ids"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMax", ["float_ids"], ["largest_id"], keepdims=0),
            helper.make_node("Add", ["alone", "largest_id"], [output]),
        ]
    nodes.append(helper.make_node("Sigmoid", [output], ["probabilities"]))
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", n_labels])
        for name in (output, "probabilities")
    ]
    graph = helper.make_graph(nodes, "bundle", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def graph_settings(*, batchable: bool = False, **changes: object) -> dict[str, object]:
    """Return a graph's entry of emodistill.json."""
    entry: dict[str, object] = {
        "precision": "fp32",
        "thresholds": [0.5] * len(LABEL_NAMES),
        "calibration_scale": None,
        "calibration_bias": None,
        "batchable": batchable,
        "portable": True,
    }
    return entry | changes


def write_settings(folder: Path, graphs: dict[str, dict[str, object]], **changes: object) -> None:
    """Write emodistill.json; the first graph is the default one."""
    settings: dict[str, object] = {
        "format": 1,
        "label_names": list(LABEL_NAMES),
        "max_length_tokens": 128,
        "default_graph": next(iter(graphs)),
        "pad_token_id": 0,
        "graphs": graphs,
    }
    (folder / "emodistill.json").write_text(json.dumps(settings | changes), encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, made from the small vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(CASES / "D18_vocab.txt", folder / "vocab.txt")
    load_tokenizer(folder).save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").unlink()


def write_bundle(folder: Path, *, max_length_tokens: int = 128) -> Path:
    """Write a bundle of two graphs: "model_fast" (one text per call) and "model" (several)."""
    write_tokenizer(folder)
    fast, portable = "onnx/model_fast.onnx", "onnx/model.onnx"
    write_graph(folder / fast, id_type=TensorProto.INT32, mask_type=None)
    write_graph(folder / portable)
    graphs = {fast: graph_settings(), portable: graph_settings(batchable=True)}
    write_settings(folder, graphs, max_length_tokens=max_length_tokens)
    return folder
