"""Pieces of a run folder: whole or not there at all, whatever is cut, lost or killed (case D15)."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from emodistill.artifacts import (
    END_MARK_NAME,
    FolderLock,
    file_sha256,
    fingerprint,
    part_folder,
    piece_state,
    publish_piece,
    read_json,
    start_piece,
    write_bytes,
    write_json,
    writing_beside,
)
from emodistill.errors import ArtifactError


def make_piece(folder: Path, name: str = "fp", content: bytes = b"0123456789") -> None:
    part = start_piece(folder, name)
    (part / "onnx").mkdir(exist_ok=True)
    (part / "weights.bin").write_bytes(content)
    (part / "onnx" / "model.bin").write_bytes(content)
    publish_piece(folder, name, description={"epochs": 3})


def test_a_published_piece_is_done_and_its_mark_lists_every_file(tmp_path: Path) -> None:
    make_piece(tmp_path / "m")
    assert piece_state(tmp_path / "m", "fp").is_done
    mark = read_json(tmp_path / "m" / END_MARK_NAME)
    # printf 0123456789 | sha256sum
    digest = "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"
    assert mark["files"] == {
        "onnx/model.bin": {"size_bytes": 10, "sha256": digest},
        "weights.bin": {"size_bytes": 10, "sha256": digest},
    }
    assert mark["made_from"] == {"epochs": 3}
    assert not part_folder(tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:6]), "6 bytes instead of 10"),  # cut to 60 %
        (lambda f: f.write_bytes(b""), "0 bytes instead of 10"),
        (lambda f: f.write_bytes(b"0123456780"), "sha256 differs"),
        (lambda f: f.unlink(), "is missing"),
        (lambda f: (f.parent / END_MARK_NAME).unlink(), "no readable end mark"),
        (lambda f: (f.parent / END_MARK_NAME).write_text('{"fingerprint": "fp"'), "no readable end mark"),
    ],
)
def test_a_damaged_piece_does_not_exist(tmp_path: Path, damage, reason: str) -> None:
    make_piece(tmp_path / "m")
    damage(tmp_path / "m" / "weights.bin")
    found = piece_state(tmp_path / "m", "fp")
    assert found.state == "damaged"
    assert reason in found.reason


def test_other_settings_make_a_piece_stale_and_publishing_replaces_it(tmp_path: Path) -> None:
    make_piece(tmp_path / "m", "old")
    assert piece_state(tmp_path / "m", "new").state == "stale"
    make_piece(tmp_path / "m", "new", b"abc")
    assert piece_state(tmp_path / "m", "new").is_done
    assert (tmp_path / "m" / "weights.bin").read_bytes() == b"abc"


def test_a_part_folder_is_kept_for_the_same_settings_and_removed_for_others(tmp_path: Path) -> None:
    part = start_piece(tmp_path / "m", "a")
    (part / "checkpoint").write_text("step 5")
    assert piece_state(tmp_path / "m", "a").state == "interrupted"
    assert piece_state(tmp_path / "m", "b").state == "missing"
    assert (start_piece(tmp_path / "m", "a") / "checkpoint").read_text() == "step 5"
    assert not (start_piece(tmp_path / "m", "b") / "checkpoint").exists()


def test_an_empty_piece_is_refused(tmp_path: Path) -> None:
    start_piece(tmp_path / "m", "a")
    with pytest.raises(ArtifactError, match="holds no file"):
        publish_piece(tmp_path / "m", "a")


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a.json", b"old")
    with pytest.raises(FileNotFoundError), writing_beside(tmp_path / "a.json") as beside:
        beside.write_bytes((tmp_path / "absent").read_bytes())
    with pytest.raises(ZeroDivisionError), writing_beside(tmp_path / "a.json") as beside:
        beside.write_bytes(b"half" * (1 // beside.write_bytes(b"")))
    assert (tmp_path / "a.json").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_json_refuses_nan_and_keeps_key_order(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"z": np.float32(0.5), "a": np.array([1, 2]), "p": Path("x")})
    assert (tmp_path / "a.json").read_text().split('"')[1] == "z"  # label order must survive (D14)
    assert read_json(tmp_path / "a.json") == {"z": 0.5, "a": [1, 2], "p": "x"}
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "b.json", {"f1": float("nan")})
    assert not (tmp_path / "b.json").exists()


def test_unreadable_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"a\.json is not readable JSON"):
        read_json(tmp_path / "a.json")


def test_fingerprints_are_the_same_in_every_process() -> None:
    program = textwrap.dedent("""
        import numpy as np
        from emodistill.artifacts import fingerprint
        print(fingerprint({"b": 1, "a": frozenset({"x", "y", "z"})}, np.arange(3, dtype=np.int8)))
    """)
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(seen) == 1


def test_fingerprints_see_values_types_and_boundaries() -> None:
    different = [
        fingerprint({"epochs": 3}),
        fingerprint({"epochs": 3.5}),
        fingerprint({"epochs": "3"}),
        fingerprint({"epochs": 3}, {}),
        fingerprint([1, 2]),
        fingerprint([1], [2]),
        fingerprint(np.array([1, 2], dtype=np.int8)),
        fingerprint(np.array([1, 2], dtype=np.int16)),
        fingerprint(np.array([[1, 2]], dtype=np.int8)),
    ]
    assert len(set(different)) == len(different)


def test_a_kill_at_any_moment_leaves_the_piece_whole_or_absent(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from emodistill.artifacts import publish_piece, start_piece
        print("ready", flush=True)
        version = 0
        while True:
            version += 1
            part = start_piece(Path(sys.argv[1]), "fp")
            for name in ("a", "b"):
                (part / name).write_bytes(b"%08d" % version * 20000)
            publish_piece(Path(sys.argv[1]), "fp")
    """)
    whole = 0
    for attempt in range(8):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "m")], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        try:
            process.wait(timeout=0.02 + 0.017 * attempt)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if piece_state(tmp_path / "m", "fp").is_done:
            whole += 1
            assert file_sha256(tmp_path / "m" / "a") == file_sha256(tmp_path / "m" / "b")
    make_piece(tmp_path / "m")  # and the next run goes through
    assert piece_state(tmp_path / "m", "fp").is_done
    assert whole > 0


def test_two_runs_on_one_folder_refuse_and_a_dead_run_blocks_nobody(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from emodistill.artifacts import FolderLock
        with FolderLock(Path(sys.argv[1])):
            print("locked", flush=True)
            time.sleep(60)
    """)
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(ArtifactError, match=f"in use by another run .process {other.pid}."), FolderLock(tmp_path):
        pass
    other.kill()
    other.wait()
    other.stdout.close()
    with FolderLock(tmp_path):
        assert (tmp_path / ".lock").read_text().strip() == str(os.getpid())
    with FolderLock(tmp_path):
        pass
