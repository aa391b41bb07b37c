"""A process that answers timing requests, and the other end of the line: JSON objects, one a line, over pipes.

A comparison with another library runs in turns: a few calls of ours, a few of theirs, again and again, each in its own
process and environment, all on the same texts. Scripts of the peers' environment import this file from its folder: it
needs the standard library and numpy, and nothing of emodistill.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np

__all__ = ["Worker", "WorkerError", "serve", "start_worker", "text_handlers"]

Handler = Callable[..., Any]

ANSWER_MARK = "answer "  # begins the lines that are meant for the other end: libraries print greetings, too


class WorkerError(RuntimeError):
    """A worker ended or failed; the message holds the last lines that it wrote."""


def serve(handlers: Mapping[str, Handler]) -> None:
    """Answer requests from standard input until it closes.

    A request is ``{"op": NAME, ...}``: the handler of that name gets the rest as keyword arguments. The answer is
    ``answer {"result": ...}`` or ``answer {"error": ...}``. Whatever the handlers print goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": handlers[request.pop("op")](**request)}
        except Exception as error:  # whatever went wrong belongs to the other end
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(ANSWER_MARK + json.dumps(answer), file=answers, flush=True)


def text_handlers(models: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Handler]:
    """Make the handlers of a worker that answers texts.

    Parameters
    ----------
    models : mapping of str to model
        Each has `encode(text)`, `run(encoded)`, which returns logits (1, n_labels), and `__call__(text)`.
    texts : sequence of str
        Requests name them by index.

    Returns
    -------
    dict
        "names", "time" (milliseconds of each call) and "logits".
    """
    encoded: dict[str, list[Any]] = {}

    def time(name: str, items: list[int], n_warmup: int, part: str = "whole") -> list[float]:
        model = models[name]
        if part == "whole":
            inputs, call = texts, model
        else:
            if name not in encoded:
                encoded[name] = [model.encode(text) for text in texts]
            inputs, call = encoded[name], model.run
        for count in range(n_warmup):
            call(inputs[items[count % len(items)]])
        times = []
        for item in items:
            start = perf_counter_ns()
            call(inputs[item])
            times.append((perf_counter_ns() - start) / 1e6)
        return times

    def logits(name: str, items: list[int]) -> list[list[float]]:
        model = models[name]
        return [np.asarray(model.run(model.encode(texts[item])), np.float64)[0].tolist() for item in items]

    return {"names": lambda: list(models), "time": time, "logits": logits}


class Worker:
    """The other end of `serve`."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self._process = process
        self._log = log

    def ask(self, op: str, **arguments: Any) -> Any:
        """Send a request and wait for its result.

        Raises
        ------
        WorkerError
            If the worker ended or its handler failed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
            line = next((line for line in self._process.stdout if line.startswith(ANSWER_MARK)), "")
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the worker ended: {self._last_lines()}")
        answer = json.loads(line.removeprefix(ANSWER_MARK))
        if "error" in answer:
            raise WorkerError(f"{op}: {answer['error']}")
        return answer["result"]

    def _last_lines(self) -> str:
        return " | ".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]) or "without a word"


@contextmanager
def start_worker(command: Sequence[str], log: Path, *, ready_op: str = "names") -> Iterator[Worker]:
    """Start a worker, wait until it answers, and end it with the block.

    Parameters
    ----------
    command : sequence of str
        Program and arguments.
    log : Path
        Takes the worker's standard error.
    ready_op : str
        A request that it must answer before the block begins.
    """
    start = perf_counter()
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
        )
        worker = Worker(process, log)
        try:
            worker.ask(ready_op)
            print(f"{log.stem} is ready after {perf_counter() - start:.0f} s", file=sys.stderr)
            yield worker
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
