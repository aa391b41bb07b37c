"""Where a call's time goes: microseconds per operator of a bundle's graph, and what its arithmetic alone would take.

    python -m emodistill.benchmarks.profile_graph --bundle BUNDLE --checkpoint STUDENT --texts dev.csv \\
        --out benchmarks/results/export/profile-tiny.json

The lower bound is the graph's int8 multiply-adds at the rate that ONNX Runtime itself reaches on one large int8
product on this machine, one thread. What lies between is reading weights that do not fit the first caches, rows too few
to fill the kernels' tiles, and everything that is no product.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import TensorProto, helper

from emodistill.artifacts import write_json
from emodistill.benchmarks.machine import describe_machine, machine_record
from emodistill.checkpoints import load_checkpoint
from emodistill.data import read_texts
from emodistill.encoder_config import EncoderConfig
from emodistill.tokenization import encode, load_tokenizer

__all__ = ["int8_multiply_adds", "measure_int8_rate", "profile_graph"]

TokenIds = npt.NDArray[np.int32]

WARMUP_CALLS = 50
PRODUCT_SIZE = 1024


def int8_multiply_adds(config: EncoderConfig, pooling: str, n_tokens: int) -> int:
    """Count the multiply-adds of the linear layers for one text; attention itself and the classifier are not int8.

    With pooling "cls" the last layer computes queries, output projection and feed-forward for one position only.

    Examples
    --------
    >>> config = EncoderConfig(family="bert", vocab_size=9, hidden_size=4, n_layers=2, n_heads=2, intermediate_size=8,
    ...                        max_positions=9)
    >>> int8_multiply_adds(config, "mean", 3)  # 2 layers x 3 tokens x (4 x 16 + 2 x 32)
    768
    >>> int8_multiply_adds(config, "cls", 3)  # 384, and in the last layer 3 x 2 x 16 + 1 x (2 x 16 + 2 x 32)
    576
    """
    d, i, e = config.hidden_size, config.intermediate_size, config.embedding_size
    keys_and_values, rest = 2 * d * d, 2 * d * d + 2 * d * i
    projection = n_tokens * e * d if e != d else 0
    last_positions = 1 if pooling == "cls" else n_tokens
    whole_layers = (config.n_layers - 1) * n_tokens * (keys_and_values + rest)
    return projection + whole_layers + n_tokens * keys_and_values + last_positions * rest


def measure_int8_rate(repeats: int = 20) -> float:
    """Return multiply-adds a second of one large u8 x s8 product in ONNX Runtime, one thread, best of `repeats`."""
    n = PRODUCT_SIZE
    weight = np.random.default_rng(0).integers(-64, 65, (n, n)).astype(np.int8)
    node = helper.make_node("MatMulInteger", ["a", "b"], ["c"])
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, [n, n])],
        [helper.make_tensor_value_info("c", TensorProto.INT32, [n, n])],
        [helper.make_tensor("b", TensorProto.INT8, [n, n], weight.tobytes(), raw=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = _session(model.SerializeToString())
    feed = {"a": np.random.default_rng(1).integers(0, 256, (n, n)).astype(np.uint8)}
    session.run(None, feed)
    best = float("inf")
    for _ in range(repeats):
        started = perf_counter()
        session.run(None, feed)
        best = min(best, perf_counter() - started)
    return n**3 / best


def profile_graph(model: Path, token_ids: Sequence[TokenIds]) -> dict[str, float]:
    """Return mean microseconds per call by operator, one text per call, one thread, after a warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        session = _session(str(model), profile_prefix=str(Path(folder) / "calls"))
        rows = [*token_ids[:WARMUP_CALLS], *token_ids]
        for ids in rows:
            session.run(None, {"input_ids": ids[None]})
        events = json.loads(Path(session.end_profiling()).read_text())
    totals: Counter[str] = Counter()
    runs = [event for event in events if event.get("name") == "model_run"][-len(token_ids) :]
    begin = runs[0]["ts"]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= begin:
            totals[event["args"]["op_name"]] += event["dur"]
    totals["(whole call)"] = sum(run["dur"] for run in runs)
    return {name: round(total / len(token_ids), 2) for name, total in totals.most_common()}


def _session(model: bytes | str, profile_prefix: str | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile_prefix:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the student that the bundle was made from")
    parser.add_argument("--texts", type=Path, required=True, help="file with a text column")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    checkpoint = load_checkpoint(given.checkpoint)
    texts = read_texts(given.texts).texts[: given.limit]
    token_ids = encode(load_tokenizer(given.bundle), texts, checkpoint.max_length_tokens)
    operators = profile_graph(given.bundle / "onnx" / "model_fast.onnx", token_ids)
    rate = measure_int8_rate()
    work = np.mean([int8_multiply_adds(checkpoint.config, checkpoint.pooling, len(ids)) for ids in token_ids])
    report: dict[str, Any] = {
        "machine": machine_record(threads=1),
        "n_texts": len(texts),
        "mean_tokens": round(float(np.mean([len(ids) for ids in token_ids])), 2),
        "microseconds_per_call": operators,
        "int8_multiply_adds_per_call": float(work),
        "int8_multiply_adds_per_second": rate,
        "arithmetic_lower_bound_us": round(work / rate * 1e6, 1),
    }
    whole = operators["(whole call)"]
    for name, microseconds in operators.items():
        print(f"{name:32} {microseconds:9.1f} us  {microseconds / whole:6.1%}")
    print(f"{'int8 arithmetic alone':32} {report['arithmetic_lower_bound_us']:9.1f} us")
    print(describe_machine(report["machine"]))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.out, report)


if __name__ == "__main__":
    _main()
