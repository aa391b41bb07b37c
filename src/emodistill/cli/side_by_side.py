"""Members trained side by side, each in a process of its own with its share of the cores.

A member in parts (see `training.use_cores`) still meets at every update, and its parts are small. Two members on one
core each together train 1.1 to 1.2 times the rows of one member on two cores; with more cores than parts it gains more.
"""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import numpy as np

from emodistill.encoders import resolve_encoder
from emodistill.errors import EmodistillError, TrainingError
from emodistill.runtime import usable_cores

__all__ = ["WORTH_A_PROCESS_S", "gpu_free_bytes", "memory_need_bytes", "processes_for", "train_side_by_side"]

GIB = 1024**3
BASE_MEMORY_BYTES = 2 * GIB  # the libraries, and the activations of a batch
COPIES_OF_WEIGHTS = 6  # weights, gradient, two moments, and those in use while loading and saving
WORTH_A_PROCESS_S = 45.0  # a process takes several seconds to load the training libraries
WATCH_INTERVAL_S = 1.0
GROWTH_VARIABLE = "TF_FORCE_GPU_ALLOW_GROWTH"  # or the first process takes the whole memory of a GPU
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")


def memory_need_bytes(encoder: str) -> int:
    """Return about how much memory the training of one member of this encoder takes; "" is none."""
    if not encoder:
        return GIB
    weights = (path.stat().st_size for path in resolve_encoder(encoder).glob("*.safetensors"))
    return BASE_MEMORY_BYTES + COPIES_OF_WEIGHTS * sum(weights)


def processes_for(needs_bytes: Sequence[int], *, n_cores: int | None = None, available_bytes: int | None = None) -> int:
    """Return how many members to train at a time: as many as there are cores and memory for, at least 1.

    Parameters
    ----------
    needs_bytes
        What each waiting member needs.
    n_cores
        By default those that this process may use.
    available_bytes
        By default what the system has left; where it does not say, members are trained one by one.
    """
    if not needs_bytes:
        return 1
    cores = usable_cores() if n_cores is None else n_cores
    available = _available_bytes() if available_bytes is None else available_bytes
    together = np.cumsum(sorted(needs_bytes, reverse=True))  # the largest may meet
    return max(1, min(cores, len(needs_bytes), int(np.searchsorted(together, available, "right"))))


def gpu_free_bytes() -> int:
    """Return the free memory of the fullest GPU, from nvidia-smi; 0 where it does not say."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return min(int(line) for line in answer.splitlines() if line.strip()) * 1024**2
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


def train_side_by_side(
    names: Sequence[str],
    n_processes: int,
    work: Callable[[str], None],
    timed: Callable[[str], AbstractContextManager[None]],
) -> None:
    """Call `work(name)` for each name, each call in a new process, `n_processes` at a time.

    Parameters
    ----------
    names
        What to work on, in order.
    work
        Something that a new process can load by name (a module's function or a partial of one).
    timed
        Entered when the work on a name begins, left when its process has ended.

    Raises
    ------
    TrainingError
        If a process fails; the others are stopped (they go on from their checkpoints next time).
    """
    context = multiprocessing.get_context("spawn")
    threads = str(max(1, usable_cores() // n_processes))
    waiting, running = list(names), dict[SpawnProcess, tuple[str, ExitStack]]()
    try:
        while waiting or running:
            while waiting and len(running) < n_processes:
                name = waiting.pop(0)
                clock = ExitStack()
                clock.enter_context(timed(name))
                process = context.Process(target=_work_in_process, args=(work, name, os.getpid()), daemon=True)
                running[process] = (name, clock)
                with _environment({**dict.fromkeys(THREAD_VARIABLES, threads), GROWTH_VARIABLE: "true"}):
                    process.start()
            wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                name, clock = running.pop(process)
                with clock:
                    if process.exitcode:
                        raise TrainingError(
                            f"{name} was not trained (its process ended with {process.exitcode}, see above): "
                            "mend that and call again, or train one at a time with  --set training_processes=1"
                        )
    except BaseException as error:
        for process, (_, clock) in running.items():
            if process.pid is not None:
                process.terminate()
                process.join()
            clock.__exit__(type(error), error, error.__traceback__)
        raise


def _work_in_process(work: Callable[[str], None], name: str, parent: int) -> None:
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    try:
        work(name)
    except EmodistillError as error:
        print(f"emodistill: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _end_with_parent(parent: int) -> None:
    """End at once when the parent is gone: two processes must never write one member."""
    while os.getppid() == parent:
        time.sleep(WATCH_INTERVAL_S)
    os._exit(1)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while; a process that starts meanwhile keeps them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 0
    return min([free, *_left_in_control_group()])


def _left_in_control_group() -> list[int]:
    """Read what a container may still take beside files that can be dropped; control groups of version 2 or 1."""
    top = Path("/sys/fs/cgroup")
    left = []
    for limit, statistics, taken in (
        (top / "memory.max", top / "memory.stat", "anon"),
        (top / "memory/memory.limit_in_bytes", top / "memory/memory.stat", "rss"),
    ):
        try:
            entries = dict(line.split() for line in statistics.read_text(encoding="ascii").splitlines())
            left.append(int(limit.read_text(encoding="ascii")) - int(entries[taken]))
        except (OSError, ValueError, KeyError):  # not there, or "max"
            continue
    return left
