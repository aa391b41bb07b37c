"""What a measurement was taken on: processor, threads, versions, commit, date and command, as one JSON object."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["describe_machine", "machine_record", "peak_memory_bytes", "shown_command"]

# Flags that decide how fast int8 and bf16 arithmetic runs, x86 and Arm.
FLAGS_THAT_MATTER = (
    "fma",
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
PACKAGES = ("numpy", "onnxruntime", "tokenizers", "tensorflow", "scikit-learn")


def machine_record(*, threads: int, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Describe the machine and the moment, for storing beside numbers.

    Parameters
    ----------
    threads : int
        Threads that the measured code was given.
    command : sequence of str, optional
        What to run to see the numbers again; by default the running command.

    Returns
    -------
    dict
        Plain JSON values. What cannot be found out is None.
    """
    cpu_model, flags = _read_processor()
    return {
        "cpu_model": cpu_model,
        "cpu_flags": [flag for flag in FLAGS_THAT_MATTER if flag in flags],
        "n_cores": os.cpu_count(),
        "n_usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shown_command() if command is None else shlex.join(command),
    }


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process so far.

    Where /proc tells it, not from `getrusage`: that one counts what the parent process held when it started this one.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe_machine(record: dict[str, Any]) -> str:
    """Say a machine record in one line for people."""
    flags = ", ".join(record["cpu_flags"]) or "no known vector flags"
    commit = f", commit {record['commit']}" if record["commit"] else ""
    threads = f"{record['threads']} thread" + ("s" if record["threads"] != 1 else "")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{record['cpu_model']} ({flags}), {threads}; {versions}; {record['date']}{commit}"


def shown_command(arguments: Sequence[str] | None = None) -> str:
    """Return the running command as somebody else would type it.

    Folders of this machine are cut off: a path outside the working directory keeps its last part only.
    """
    arguments = sys.argv if arguments is None else arguments
    specification = getattr(sys.modules.get("__main__"), "__spec__", None)
    if specification is not None and specification.name.startswith("emodistill"):
        program = ["python", "-m", specification.name.removesuffix(".__main__")]
    else:
        program = [Path(arguments[0]).name]
    return shlex.join([*program, *(_without_folders(argument) for argument in arguments[1:])])


def _without_folders(argument: str) -> str:
    option, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(value)
    if not path.is_absolute():
        return argument
    inside = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(path.name)
    return f"{option}{equals}{inside}"


def _read_processor() -> tuple[str, set[str]]:
    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return model, flags
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
    return model, flags


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the checkout that this file belongs to, "+" for uncommitted changes; None if installed."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
