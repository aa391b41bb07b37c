"""Latency: what is counted, in which order, and what is recorded beside it."""

import subprocess
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import pytest

from emodistill.benchmarks import machine
from emodistill.benchmarks.latency import (
    GraphModel,
    Latency,
    ModelChain,
    measure_latency,
    summarize_times,
    time_interleaved,
)


class Sleeper:
    """Tokenizes in 1 ms and answers in 3 ms, counting its calls."""

    def __init__(self) -> None:
        self.answered: list[str] = []

    def encode(self, text: str) -> str:
        sleep(0.001)
        return text

    def run(self, encoded: str) -> None:
        self.answered.append(encoded)
        sleep(0.003)

    def __call__(self, text: str) -> None:
        self.run(self.encode(text))


def test_summary_is_over_all_calls() -> None:
    # sorted: 1 2 3 4 10; the median is 3, p95 lies at index 0.95 * 4 = 3.8: 4 + 0.8 * 6 = 8.8; the mean is 20 / 5
    times_ms = np.array([[4.0, 1.0, 10.0, 3.0, 2.0]])
    assert summarize_times(times_ms, n_warmup=7) == Latency(
        p50_ms=3.0, p95_ms=8.8, mean_ms=4.0, n_texts=5, n_repeats=1, n_warmup=7
    )


def test_models_take_turns_on_the_same_items_and_warm_up_before_each_turn() -> None:
    order: list[tuple[str, int]] = []
    calls: dict[str, Any] = {name: lambda item, name=name: order.append((name, item)) for name in ("a", "b")}
    times = time_interleaved(calls, 4, n_repeats=2, n_warmup=3)
    assert {name: values.shape for name, values in times.items()} == {"a": (2, 4), "b": (2, 4)}
    assert all((values > 0).all() for values in times.values())
    turns = [order[start : start + 7] for start in range(0, len(order), 7)]  # 3 warm-up calls and 4 that count
    assert [len({name for name, _ in turn}) for turn in turns] == [1, 1, 1, 1]
    first, second = turns[0], turns[1]
    assert {first[0][0], second[0][0]} == {"a", "b"}
    assert [item for _, item in first] == [item for _, item in second]
    assert sorted(item for _, item in first[3:]) == [0, 1, 2, 3]


def test_nothing_to_time_is_said() -> None:
    with pytest.raises(ValueError, match="at least one text"):
        time_interleaved({}, 0)


def test_tokenizer_and_model_are_measured_apart() -> None:
    model = Sleeper()
    report = measure_latency({"sleeper": model}, ["a", "b", "c"], n_repeats=2, n_warmup=1)["sleeper"]
    # A sleep never ends early: the bounds from below are sure, those from above leave a busy machine 20 ms.
    assert 4 <= report.with_tokenizing.p50_ms < 24
    assert 3 <= report.without_tokenizing.p50_ms < 23
    assert 1 <= report.tokenizing.p50_ms < 21
    assert report.tokenizing.p50_ms < report.without_tokenizing.p50_ms
    assert report.with_tokenizing.n_texts == 3
    # with and without tokenizing, each 2 rounds of 1 warm-up call and 3 that count
    assert len(model.answered) == 2 * 2 * (1 + 3)


def test_a_chain_answers_with_each_of_its_models() -> None:
    first, second = Sleeper(), Sleeper()
    start = perf_counter()
    ModelChain([first, second])("text")
    assert perf_counter() - start >= 0.008
    chain = ModelChain([first, second])
    chain.run(chain.encode("again"))
    assert first.answered == second.answered == ["text", "again"]


def test_graph_model_feeds_what_the_graph_asks_for(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the train extra")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    def graph_input(name: str, dtype: int) -> Any:
        return onnx.helper.make_tensor_value_info(name, dtype, ["batch", "sequence"])

    int64, int32 = onnx.TensorProto.INT64, onnx.TensorProto.INT32
    nodes = [
        onnx.helper.make_node("Cast", ["attention_mask"], ["mask"], to=int64),
        onnx.helper.make_node("Mul", ["input_ids", "mask"], ["masked"]),
        onnx.helper.make_node("Add", ["masked", "token_type_ids"], ["sum"]),
        onnx.helper.make_node("Cast", ["sum"], ["logits"], to=onnx.TensorProto.FLOAT),
    ]
    inputs = [
        graph_input("input_ids", int64),
        graph_input("attention_mask", int32),
        graph_input("token_type_ids", int64),
    ]
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", "sequence"])
    graph = onnx.helper.make_graph(nodes, "sum", inputs, [logits])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "so": 5, "kind": 7}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    # ids times a mask of ones plus segment zeros: the ids themselves
    assert GraphModel(tmp_path / "model.onnx", tokenizer, max_length_tokens=8)("so kind").tolist() == [[5.0, 7.0]]


def test_machine_record_says_what_a_reader_needs() -> None:
    record = machine.machine_record(threads=1, command=["make", "bench"])
    assert record["threads"] == 1
    assert record["command"] == "make bench"
    assert record["n_usable_cores"] >= 1
    assert record["versions"]["onnxruntime"].count(".") == 2
    assert record["cpu_model"]
    root = Path(machine.__file__).resolve().parents[1]
    if (root / ".git").exists() and record["commit"] is not None:
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        assert head.startswith(record["commit"].rstrip("+"))
    assert "1 thread;" in machine.describe_machine(record)


def test_recorded_command_names_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    inside, outside = str(tmp_path / "runs" / "a"), "/somewhere/else/dev.csv"
    shown = machine.shown_command(["/usr/bin/emodistill", "bench", inside, f"--texts={outside}", "--limit", "5"])
    assert shown.endswith("bench runs/a --texts=dev.csv --limit 5")
    assert "/" not in shown.split()[0]
