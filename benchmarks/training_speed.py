"""Training speed against Hugging Face's PyTorch model: the same encoder, batches, lengths and schedule, in turns.

    python -m emodistill.benchmarks.training_speed --train train.csv --encoder minilm-l6 \\
        --peers-python .venv-peers/bin/python --out benchmarks/results/training-speed/minilm-l6.json

Each side trains in a process of its own and stops after some steps to let the other go on, so that both see the same
machine. The first turn of each (building, tracing, first touches of memory) is not counted. Our side is
`classifier_training.train_classifier` as members use it, and nothing else: the word table holds the pieces of the whole
training file, as it would in a real run.
"""

import argparse
import json
import os
import queue
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from emodistill.artifacts import write_json
from emodistill.benchmarks.machine import describe_machine, machine_record
from emodistill.benchmarks.worker import Worker, serve, start_worker
from emodistill.data import read_dataset
from emodistill.encoders import resolve_encoder
from emodistill.progress import Progress
from emodistill.tokenization import encode, load_tokenizer

__all__ = ["compare_training", "summarize_turns", "write_batches"]

PEER_SCRIPT = Path(__file__).parent / "peers" / "torch_training.py"
MAX_LENGTH_TOKENS = 128
OUR_RECIPES = {"emodistill bf16": "bfloat16", "emodistill fp32": "float32"}


def write_batches(
    path: Path,
    token_ids: Sequence[npt.NDArray[np.int32]],
    labels: npt.NDArray[np.int8],
    batches: Sequence[npt.NDArray[np.int64]],
    batch_lengths: Sequence[int],
) -> None:
    """Write batches for the peers.

    Parameters
    ----------
    path : Path
        npz file: `ids` (all tokens, row after row) and `lengths` of the rows in the order of the batches, `labels`,
        `batch_sizes`, `batch_lengths`.
    token_ids : sequence of int32 array
        Of all rows.
    labels : int8 array of shape (n_rows, n_labels)
    batches : sequence of int64 array
        Row numbers.
    batch_lengths : sequence of int
        What each batch is padded to.
    """
    order = np.concatenate(list(batches))
    np.savez(
        path,
        ids=np.concatenate([token_ids[row] for row in order]),
        lengths=np.array([len(token_ids[row]) for row in order], np.int32),
        labels=labels[order],
        batch_sizes=np.array([len(rows) for rows in batches], np.int32),
        batch_lengths=np.array(batch_lengths, np.int32),
    )


def summarize_turns(
    seconds: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], batch_sizes: Sequence[int]
) -> dict[str, Any]:
    """Turn the steps of all turns into examples per second, without the first turn.

    Parameters
    ----------
    seconds, losses : sequences of turns, each with one number per step
    batch_sizes : sequence of int
        Of all steps, in their order.

    Returns
    -------
    dict
        "examples_per_second" over all counted steps, its value "by_turn", "mean_loss_by_turn" with the first turn.
    """
    ends = np.cumsum([len(turn) for turn in seconds])
    n_examples = [sum(batch_sizes[end - len(turn) : end]) for turn, end in zip(seconds, ends.tolist(), strict=True)]
    rates = [n / sum(turn) for n, turn in zip(n_examples[1:], seconds[1:], strict=True)]
    return {
        "examples_per_second": round(sum(n_examples[1:]) / sum(map(sum, seconds[1:])), 2),
        "by_turn": [round(rate, 2) for rate in rates],
        "mean_loss_by_turn": [round(float(np.mean(turn)), 4) for turn in losses],
    }


def compare_training(
    spec: Mapping[str, Any], batch_sizes: Sequence[int], *, peers_python: Path | None, n_turns: int
) -> dict[str, dict[str, Any]]:
    """Train all contenders in turns on the same batches.

    Parameters
    ----------
    spec : mapping
        What the workers read: see `main`.
    batch_sizes : sequence of int
        Of all steps; their number is a multiple of `n_turns`.
    peers_python : Path or None
        Interpreter of the peers' environment; without it our side runs alone.
    n_turns : int
        At least 2: the first is not counted.

    Returns
    -------
    dict
        By contender, see `summarize_turns`.
    """
    work = Path(spec["work"])
    write_json(work / "spec.json", spec)
    commands = {"ours": [sys.executable, "-m", "emodistill.benchmarks.training_speed", "--serve"]}
    if peers_python is not None:
        commands["torch"] = [str(peers_python), str(PEER_SCRIPT)]
    n_steps = len(batch_sizes) // n_turns
    with ExitStack() as stack:
        contenders: dict[str, Worker] = {}
        for key, command in commands.items():
            worker = stack.enter_context(start_worker([*command, str(work / "spec.json")], work / f"{key}.log"))
            contenders |= dict.fromkeys(worker.ask("names"), worker)
        turns: dict[str, list[dict[str, list[float]]]] = {name: [] for name in contenders}
        for turn in range(n_turns):
            for name, worker in contenders.items():
                turns[name].append(worker.ask("train", name=name, first=turn * n_steps, last=(turn + 1) * n_steps))
                print(f"turn {turn + 1} of {n_turns}: {name}, {sum(turns[name][-1]['seconds']):.1f} s", file=sys.stderr)
    return {
        name: summarize_turns([turn["seconds"] for turn in own], [turn["losses"] for turn in own], batch_sizes)
        for name, own in turns.items()
    }


# ---------------------------------------------------------------- our side of the pipe


class _TurnProgress(Progress):
    """Stops a fit after the steps that were asked for: `fit` reports each step here before it begins the next one."""

    def __init__(self, turns: "_Turns") -> None:
        super().__init__("", None)
        self._turns = turns

    def advance(self, n: int = 1, note: str = "") -> None:
        """Note the step's time and loss, and wait if it was the turn's last."""
        self._turns.note_step(float(note.removeprefix("loss ")))

    def close(self) -> None:
        """Write nothing."""


class _Turns:
    """A fit that runs in a thread, some steps at a time."""

    def __init__(self, spec: Mapping[str, Any], precision: str) -> None:
        self._requests: queue.Queue[int] = queue.Queue()
        self._answers: queue.Queue[dict[str, list[float]] | BaseException] = queue.Queue()
        self._thread = threading.Thread(target=self._run, args=(spec, precision), daemon=True)
        self._left, self._started = 0, 0.0
        self._seconds: list[float] = []
        self._losses: list[float] = []

    def train(self, first: int, last: int) -> dict[str, list[float]]:
        """Let the fit go on for some steps and return their seconds and losses."""
        self._requests.put(last - first)
        if not self._thread.is_alive():
            self._thread.start()
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def note_step(self, loss: float) -> None:
        """Called by the fit's thread after each step."""
        now = perf_counter()
        self._seconds.append(now - self._started)
        self._losses.append(loss)
        self._left -= 1
        if self._left == 0:
            self._answers.put({"seconds": self._seconds, "losses": self._losses})
            self._wait()
        else:
            self._started = now

    def _wait(self) -> None:
        self._seconds, self._losses = [], []
        self._left = self._requests.get()
        self._started = perf_counter()

    def _run(self, spec: Mapping[str, Any], precision: str) -> None:
        self._wait()
        try:
            _fit(spec, precision, self)
        except BaseException as error:
            self._answers.put(error)


def _fit(spec: Mapping[str, Any], precision: str, turns: _Turns) -> None:
    from emodistill.checkpoints import ModelCheckpoint, load_encoder_weights
    from emodistill.classifier_training import train_classifier
    from emodistill.losses import binary_cross_entropy
    from emodistill.training_config import TrainingConfig

    dataset = read_dataset(Path(spec["train"]))
    assert dataset.labels is not None
    rows = spec["rows"]
    config, weights = load_encoder_weights(spec["encoder"])
    n_labels = len(dataset.label_names)
    weights["classifier.weight"] = (
        np.random.default_rng(spec["seed"]).normal(0, 0.02, (n_labels, config.hidden_size)).astype(np.float32)
    )
    weights["classifier.bias"] = np.zeros(n_labels, np.float32)
    with tempfile.TemporaryDirectory() as work:
        train_classifier(
            ModelCheckpoint(
                config=config,
                pooling="mean",
                label_names=dataset.label_names,
                max_length_tokens=MAX_LENGTH_TOKENS,
                weights=weights,
                tokenizer_json=load_tokenizer(spec["encoder"]).to_str(),
            ),
            [dataset.texts[row] for row in rows],
            [dataset.labels[rows].astype(np.float32)],
            binary_cross_entropy,
            TrainingConfig(**spec["training"]),
            precision=precision,
            evaluation_texts={"whole file": dataset.texts},  # its pieces are in the word table; it is never predicted
            work_dir=Path(work),
            fingerprint="",
            progress_factory=lambda *_: _TurnProgress(turns),
        )


def _serve_ours(path: Path) -> None:
    import tensorflow as tf

    from emodistill.training import use_cores

    spec = json.loads(path.read_text(encoding="utf-8"))
    use_cores(spec["threads"])
    fits = {name: _Turns(spec, precision) for name, precision in OUR_RECIPES.items()}

    def train(name: str, first: int, last: int) -> dict[str, list[float]]:
        return fits[name].train(first, last)

    serve({"names": lambda: list(fits), "train": train, "versions": lambda: {"tensorflow": tf.__version__}})
    os._exit(0)  # the fits wait in their threads for a turn that does not come


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare training speed with PyTorch on the same batches."""
    parser = argparse.ArgumentParser(prog="python -m emodistill.benchmarks.training_speed", description=main.__doc__)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--train", type=Path, help="labelled file")
    parser.add_argument("--encoder", default="minilm-l6")
    parser.add_argument("--peers-python", type=Path, help="interpreter of the peers' environment (make peers)")
    parser.add_argument("--turns", type=int, default=5, help="at least 2; the first is not counted")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args(arguments)
    if given.serve:
        _serve_ours(given.serve)
        return
    if given.train is None or given.turns < 2:
        parser.error("--train is needed, and --turns of at least 2")

    from emodistill.training import epoch_batches, learning_rate_at, pad_batch
    from emodistill.training_config import TrainingConfig

    dataset = read_dataset(given.train)
    assert dataset.labels is not None
    encoder = resolve_encoder(given.encoder)
    n_steps = given.turns * given.steps
    n_rows = min(n_steps * given.batch_size, len(dataset.texts))
    rows = np.sort(np.random.default_rng(0).choice(len(dataset.texts), n_rows, replace=False))
    training = TrainingConfig(epochs=1, batch_size=given.batch_size, learning_rate=given.learning_rate)
    token_ids = encode(load_tokenizer(encoder), [dataset.texts[row] for row in rows], MAX_LENGTH_TOKENS)
    batches = epoch_batches(np.array([len(ids) for ids in token_ids]), given.batch_size, training.seed, 0)
    if len(batches) < n_steps:
        parser.error(
            f"{given.train} gives {len(batches)} batches, and {n_steps} are asked for: lower --turns or --steps"
        )
    lengths = [pad_batch([token_ids[row] for row in batch], 0)[0].shape[1] for batch in batches]
    with tempfile.TemporaryDirectory() as work:
        write_batches(Path(work) / "batches.npz", token_ids, dataset.labels[rows], batches, lengths)
        spec = {
            "work": work,
            "batches": str(Path(work) / "batches.npz"),
            "train": str(given.train.absolute()),
            "rows": rows.tolist(),
            "encoder": str(encoder),
            "seed": training.seed,
            "threads": given.threads,
            "learning_rates": [learning_rate_at(step, n_steps, training) for step in range(n_steps)],
            "weight_decay": training.weight_decay,
            "clip_norm": training.clip_norm,
            "training": {"epochs": 1, "batch_size": given.batch_size, "learning_rate": given.learning_rate},
        }
        python = given.peers_python.absolute() if given.peers_python else None
        results = compare_training(spec, [len(batch) for batch in batches], peers_python=python, n_turns=given.turns)
    print(f"{'':32}{'examples/s':>12}{'last loss':>12}")
    for name, result in results.items():
        print(f"{name:32}{result['examples_per_second']:12.1f}{result['mean_loss_by_turn'][-1]:12.4f}")
    machine = machine_record(threads=given.threads)
    print(describe_machine(machine))
    if given.out:
        settings = {
            "encoder": given.encoder,
            "batch_size": given.batch_size,
            "turns": given.turns,
            "steps": given.steps,
        }
        mean_tokens = float(np.mean([len(ids) for ids in token_ids]))
        write_json(
            given.out,
            {"machine": machine, "settings": settings, "mean_tokens": round(mean_tokens, 2), "results": results},
        )


if __name__ == "__main__":
    main()
