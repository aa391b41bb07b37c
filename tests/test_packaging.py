"""The wheel holds the tree's package files, nothing else, and installs."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Folder of the tree -> folder of the wheel. Written out here and not read from pyproject.toml: it is what is tested.
PACKAGE_FOLDERS = {
    "src/emodistill": "emodistill",
    "ensemble": "emodistill/ensemble",
    "distill": "emodistill/distill",
    "export": "emodistill/export",
    "benchmarks": "emodistill/benchmarks",
}
NOT_SHIPPED = {"__pycache__", "results", "demo", "peers", "LOG.md", "README.md"}


def package_files() -> set[str]:
    """Files of the tree that a user needs, under the names they should have in the wheel."""
    found = set()
    for folder, target in PACKAGE_FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            parts = path.relative_to(ROOT / folder).parts
            if path.is_file() and not NOT_SHIPPED.intersection(parts) and not path.name.startswith("."):
                found.add("/".join((target, *parts)))
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy, so that a stale build/ folder cannot lend the wheel a file that is gone."""
    pytest.importorskip("build", reason="needs the dev extra")
    # By its record: importing setuptools after distutils, which other tests' libraries load, is refused by setuptools.
    if int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("needs setuptools 77 of the dev extra")
    copy = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "node_modules", "results", "*.egg-info")
    for folder in PACKAGE_FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_package_files_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = package_files()
    assert names - expected == set(), "in the wheel, not in the tree"
    assert expected - names == set(), "in the tree, not in the wheel: list it in pyproject.toml"
    assert {name.split("/")[0] for name in names} == {"emodistill"}
    # A set comparison of two empty sets would pass: these three are always there.
    assert {"emodistill/py.typed", "emodistill/errors.py", "emodistill/ensemble/__init__.py"} <= names


def test_wheel_is_small_enough_to_ship_with_a_model(wheel: Path) -> None:
    assert wheel.stat().st_size <= 12_000_000


def test_wheel_names_its_licence_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata_name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(metadata_name).decode()
        entry_points = archive.read(metadata_name.replace("METADATA", "entry_points.txt")).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "emodistill = emodistill.cli:main" in entry_points
    base = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    names = sorted(line.split()[1].split(">")[0].split("=")[0] for line in base)
    assert names == ["click", "numpy", "onnxruntime", "tokenizers"]


def test_wheel_installs_and_imports_from_where_it_was_put(wheel: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    done = subprocess.run([*pip, str(tmp_path / "site"), str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import emodistill, emodistill.export, emodistill.errors\n"
        "print(emodistill.__version__, emodistill.__file__, emodistill.export.__file__, sep='\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    version, core, stage = done.stdout.split()
    assert wheel.name.startswith(f"emodistill-{version}-")
    assert Path(core) == tmp_path / "site" / "emodistill" / "__init__.py"
    assert Path(stage) == tmp_path / "site" / "emodistill" / "export" / "__init__.py"
