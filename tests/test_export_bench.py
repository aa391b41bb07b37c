"""Comparison across processes: turns, order, errors, and which contenders go on."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="needs the train extra")

from emodistill.benchmarks import worker as worker_module
from emodistill.benchmarks.export_bench import Contender, _group, _ratios, choose_fastest, time_in_turns
from emodistill.benchmarks.worker import Worker, WorkerError, start_worker

SCRIPT = """
import sys, time
sys.path.append(sys.argv[1])
from worker import serve, text_handlers

class Model:
    def __init__(self, ms): self.ms = ms; self.log = []
    def encode(self, text): return text
    def run(self, text): self.log.append(text); time.sleep(self.ms / 1000); return [[float(len(text)), self.ms]]
    def __call__(self, text): time.sleep(0.002); return self.run(text)

models = {"slow": Model(6.0), "fast": Model(1.0)}
print("a library that greets on standard output")
def fail(): raise ValueError("no such precision")
def leave(): print("out of memory", file=sys.stderr, flush=True); sys.exit(3)
log = lambda name: models[name].log
serve({**text_handlers(models, ["a", "bb", "ccc"]), "fail": fail, "leave": leave, "log": log})
"""


@pytest.fixture
def sleepers(tmp_path: Path) -> Iterator[Worker]:
    script = tmp_path / "sleepers.py"
    script.write_text(SCRIPT)
    folder = str(Path(worker_module.__file__).parent)
    with start_worker([sys.executable, str(script), folder], tmp_path / "sleepers.log") as worker:
        yield worker


def test_worker_times_whole_and_part(sleepers: Worker) -> None:
    assert sleepers.ask("names") == ["slow", "fast"]
    whole = sleepers.ask("time", name="fast", items=[2, 0], n_warmup=1)
    alone = sleepers.ask("time", name="fast", items=[2, 0], n_warmup=1, part="graph")
    assert len(whole) == len(alone) == 2
    assert min(whole) >= 3.0  # 2 ms of tokenizing and 1 ms of answering: a sleep never ends early
    assert min(alone) >= 1.0
    # one warm-up call and two that count, each time; the encoded texts are those of the items
    assert sleepers.ask("log", name="fast") == ["ccc", "ccc", "a"] * 2


def test_worker_gives_logits_of_the_items_asked_for(sleepers: Worker) -> None:
    assert sleepers.ask("logits", name="slow", items=[1, 0]) == [[2.0, 6.0], [1.0, 6.0]]


def test_failure_of_a_handler_reaches_the_other_end_and_the_worker_lives_on(sleepers: Worker) -> None:
    with pytest.raises(WorkerError, match="fail: ValueError: no such precision"):
        sleepers.ask("fail")
    assert sleepers.ask("names") == ["slow", "fast"]


def test_end_of_a_worker_is_reported_with_its_last_words(sleepers: Worker) -> None:
    with pytest.raises(WorkerError, match=r"the worker ended: .*out of memory"):
        sleepers.ask("leave")


def test_turns_put_times_in_the_order_of_the_items(sleepers: Worker) -> None:
    contenders = [Contender(name, sleepers, "peers") for name in ("slow", "fast")]
    times = time_in_turns(contenders, 3, n_rounds=2, n_warmup=0, part="graph")
    assert times["slow"].shape == (2, 3)
    assert times["slow"].min() >= 6.0
    assert np.median(times["fast"]) < np.median(times["slow"])
    # In each round all items once, in one order for both.
    slow, fast = sleepers.ask("log", name="slow"), sleepers.ask("log", name="fast")
    assert slow == fast
    assert sorted(slow[:3]) == sorted(slow[3:]) == ["a", "bb", "ccc"]


class Recorded:
    """Answers each item with its own number as milliseconds."""

    def ask(self, op: str, **request: Any) -> list[float]:
        assert op == "time"
        return [float(item) for item in request["items"]]


def test_times_are_unshuffled() -> None:
    contender = Contender("a", Recorded(), "peers")  # type: ignore[arg-type]
    times = time_in_turns([contender], 5, n_rounds=4, n_warmup=0)
    assert times["a"].tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0]] * 4


def test_fastest_of_each_group_go_on_and_all_of_ours() -> None:
    groups = {
        "a": "ours",
        "b": "ours",
        "c": "optimum int8",
        "d": "optimum int8",
        "e": "optimum int8",
        "f": "torch fp32",
    }
    contenders = [Contender(name, Recorded(), group) for name, group in groups.items()]  # type: ignore[arg-type]
    median_ms = {"a": 9.0, "b": 1.0, "c": 3.0, "d": 1.0, "e": 2.0, "f": 40.0}
    assert [c.name for c in choose_fastest(contenders, median_ms, n_kept=2)] == ["a", "b", "d", "e", "f"]
    assert [c.name for c in choose_fastest(contenders, median_ms, n_kept=1)] == ["a", "b", "d", "f"]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("torch fp32 sdpa", "torch fp32"),
        ("torch distilroberta-size bf16 eager", "torch distilroberta-size bf16"),
        ("optimum O2 fp32", "optimum fp32"),
        ("optimum O1 int8 avx2 per channel", "optimum int8"),
        ("optimum O3 int8 avx2", "optimum int8 helped"),
    ],
)
def test_peers_compete_within_library_size_and_precision(name: str, group: str) -> None:
    assert _group(name, {"optimum O3 int8 avx2"}) == group


def test_ratios_divide_by_the_best_of_each_group() -> None:
    def model(group: str, p50_ms: float) -> dict[str, Any]:
        return {"group": group, "with_tokenizing": {"p50_ms": p50_ms}}

    models = {
        "onnx/model_fast.onnx": model("ours", 0.6),
        "onnx/model.onnx": model("ours", 0.1),
        "optimum O1 int8": model("optimum int8", 1.2),
        "optimum O2 int8": model("optimum int8", 1.0),
        "torch fp32 sdpa": model("torch fp32", 6.0),
    }
    assert _ratios(models, "onnx/model_fast.onnx") == {
        "onnx/model_fast.onnx / best optimum int8": 0.6,  # 0.6 / 1.0
        "onnx/model_fast.onnx / best torch fp32": 0.1,  # 0.6 / 6.0
    }


def test_the_peers_script_side_needs_nothing_of_ours() -> None:
    lines = Path(worker_module.__file__).read_text().splitlines()
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported - set(sys.stdlib_module_names) == {"numpy"}
