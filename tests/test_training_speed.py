"""Training speed: what the peers are given, what is counted, and a fit that stops between turns."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="needs the train extra")

from emodistill.benchmarks import training_speed
from emodistill.benchmarks.training_speed import _TurnProgress, _Turns, summarize_turns, write_batches


def test_batches_hold_rows_in_the_order_of_the_batches(tmp_path: Path) -> None:
    token_ids = [np.array(ids, np.int32) for ids in ([2, 3], [2, 9, 3], [2, 7, 8, 3])]
    labels = np.array([[0, 1], [1, 0], [1, 1]], np.int8)
    batches = [np.array([2, 0]), np.array([1])]
    write_batches(tmp_path / "batches.npz", token_ids, labels, batches, [4, 4])
    with np.load(tmp_path / "batches.npz", allow_pickle=False) as arrays:
        saved = {name: arrays[name].tolist() for name in arrays.files}
    assert saved == {
        "ids": [2, 7, 8, 3, 2, 3, 2, 9, 3],
        "lengths": [4, 2, 3],
        "labels": [[1, 1], [0, 1], [1, 0]],
        "batch_sizes": [2, 1],
        "batch_lengths": [4, 4],
    }


def test_first_turn_is_not_counted() -> None:
    # Steps of 32, 32 | 32, 16 | 8, 8 examples. Counted: 48 examples in 1 + 1 s, 16 in 0.5 + 1.5 s: 64 / 4 = 16 per s.
    summary = summarize_turns(
        [[60.0, 9.0], [1.0, 1.0], [0.5, 1.5]], [[0.7, 0.6], [0.5, 0.4], [0.3, 0.2]], [32, 32, 32, 16, 8, 8]
    )
    assert summary == {"examples_per_second": 16.0, "by_turn": [24.0, 8.0], "mean_loss_by_turn": [0.65, 0.45, 0.25]}


def test_a_fit_goes_on_only_when_it_is_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    begun = threading.Event()

    def fit(spec: Any, precision: str, turns: _Turns) -> None:
        progress = _TurnProgress(turns)
        for step in range(5):
            done.append(step)
            if step == 2:
                begun.set()
            progress.advance(32, note=f"loss {step / 10:.4f}")

    monkeypatch.setattr(training_speed, "_fit", fit)
    turns = _Turns({}, "float32")
    first = turns.train(0, 2)
    assert first["losses"] == [0.0, 0.1]
    assert len(first["seconds"]) == 2
    assert all(seconds >= 0 for seconds in first["seconds"])
    assert not begun.wait(0.2), "the third step began before its turn"
    assert turns.train(2, 5)["losses"] == [0.2, 0.3, 0.4]
    assert done == [0, 1, 2, 3, 4]


def test_a_failing_fit_fails_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(spec: Any, precision: str, turns: _Turns) -> None:
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(training_speed, "_fit", fit)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        _Turns({}, "float32").train(0, 2)
