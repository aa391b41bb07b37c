"""Processes side by side: how many, what they are given, and how they end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from emodistill.cli.side_by_side import gpu_free_bytes, processes_for, train_side_by_side
from emodistill.errors import InputError, TrainingError

GIB = 1024**3


@contextmanager
def untimed(_name: str) -> Iterator[None]:
    yield


def meet(folder: Path, name: str) -> None:
    """End when the other one has begun: this works side by side only."""
    (folder / name).write_text(os.environ["TF_NUM_INTRAOP_THREADS"])
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2:
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)


def fail_or_wait(name: str) -> None:
    if name == "bad":
        raise InputError("row 3 is bad: mend it")
    time.sleep(300)


def tick(path: Path, _name: str) -> None:
    while True:
        path.write_text(str(time.monotonic()))
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("needs", "cores", "available", "expected"),
    [
        ([], 8, 100 * GIB, 1),
        ([2 * GIB] * 10, 2, 100 * GIB, 2),
        ([2 * GIB] * 10, 8, 7 * GIB, 3),
        ([2 * GIB], 8, 100 * GIB, 1),
        ([2 * GIB, 6 * GIB, 6 * GIB], 8, 11 * GIB, 1),  # the two large ones may meet
        ([2 * GIB] * 3, 8, 0, 1),
    ],
)
def test_as_many_as_cores_and_memory_allow(needs: list[int], cores: int, available: int, expected: int) -> None:
    assert processes_for(needs, n_cores=cores, available_bytes=available) == expected


def test_the_fullest_gpu_decides_and_no_gpu_has_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_free_bytes() == 0
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 80000\necho 6144\n")
    tool.chmod(0o755)
    assert gpu_free_bytes() == 6 * GIB
    tool.write_text("#!/bin/sh\necho no devices were found\nexit 6\n")
    assert gpu_free_bytes() == 0


def test_a_batch_goes_to_a_gpu_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tf = pytest.importorskip("tensorflow")
    from emodistill import training

    monkeypatch.setattr(tf.config.threading, "get_inter_op_parallelism_threads", lambda: 4)
    assert training._cores_side_by_side() == 4
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind])
    assert training._cores_side_by_side() == 1


def test_work_runs_side_by_side_on_a_share_of_the_cores(tmp_path: Path) -> None:
    before = dict(os.environ)
    train_side_by_side(["a", "b"], 2, partial(meet, tmp_path), untimed)
    threads = {path.name: int(path.read_text()) for path in tmp_path.iterdir()}
    assert set(threads) == {"a", "b"}
    assert 1 <= threads["a"] <= max(1, (os.cpu_count() or 1) // 2)
    assert dict(os.environ) == before


def test_a_failure_stops_the_others_and_every_clock(capfd: pytest.CaptureFixture[str]) -> None:
    ended = []

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        try:
            yield
        except TrainingError:
            ended.append(name)
            raise

    started = time.monotonic()
    with pytest.raises(TrainingError, match="bad was not trained"):
        train_side_by_side(["slow", "bad", "never"], 2, fail_or_wait, timed)
    assert time.monotonic() - started < 120
    assert sorted(ended) == ["bad", "slow"]
    assert "row 3 is bad: mend it" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_no_process_outlives_the_one_that_started_it(tmp_path: Path) -> None:
    code = (
        "from functools import partial; from pathlib import Path\n"
        "from test_side_by_side import tick, untimed\n"
        "from emodistill.cli.side_by_side import train_side_by_side\n"
        "if __name__ == '__main__':\n"
        f"    train_side_by_side(['a', 'b'], 2, partial(tick, Path({str(tmp_path / 'tick')!r})), untimed)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    parent = subprocess.Popen([sys.executable, str(script)], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "tick").exists():
        assert time.monotonic() < deadline
        assert parent.poll() is None
        time.sleep(0.1)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    time.sleep(3)
    last = (tmp_path / "tick").read_text()
    time.sleep(1)
    assert (tmp_path / "tick").read_text() == last
