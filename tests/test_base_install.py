"""What works with the base install alone, and what is said when an extra is missing.

A prelude hides every installed package but those of the install under test, as if they were not there: `import` fails
and `find_spec` finds nothing.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="needs the train extra to write graphs")

from bundles import CASES, write_bundle

ROOT = Path(__file__).resolve().parents[1]
BASE = {"numpy", "onnxruntime", "tokenizers", "click"}
# Import names of the extras; the first test compares with pyproject.toml, where names are those of the registry.
TRAIN = {
    "tensorflow",
    "tf_keras",
    "tensorflow_model_optimization",
    "tf2onnx",
    "onnx",
    "sklearn",
    "scipy",
    "threadpoolctl",
    "transformers",
    "safetensors",
    "matplotlib",
}
# Without these a user with the base install cannot predict, read files or look at results.
CORE = {
    "emodistill",
    "emodistill.artifacts",
    "emodistill.checking",
    "emodistill.cli",
    "emodistill.cli.check",
    "emodistill.cli.predict",
    "emodistill.data",
    "emodistill.encoder_config",
    "emodistill.encoders",
    "emodistill.errors",
    "emodistill.folds",
    "emodistill.formats",
    "emodistill.metrics",
    "emodistill.predictions",
    "emodistill.progress",
    "emodistill.runtime",
    "emodistill.scanning",
    "emodistill.submission",
    "emodistill.thresholds",
    "emodistill.tokenization",
}

PRELUDE = """
import sys

class Hide:
    def __init__(self, finders, is_hidden):
        self.finders, self.is_hidden = finders, is_hidden
    def find_spec(self, name, path=None, target=None):
        if self.is_hidden(name.partition(".")[0]):
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders if hasattr(finder, "find_spec"))
        return next((spec for spec in specs if spec is not None), None)
    def invalidate_caches(self):
        pass

def hide(is_hidden):
    assert not any(is_hidden(name.partition(".")[0]) for name in sys.modules), "imported before it was hidden"
    sys.meta_path = [Hide(list(sys.meta_path), is_hidden)]
"""
ONLY_BASE = PRELUDE + (
    "started = {name.partition('.')[0] for name in sys.modules}\n"
    f"shown = {BASE | {'emodistill'}} | set(sys.stdlib_module_names) | started\n"
    "hide(lambda name: name not in shown)\n"
)
NO_PARQUET = PRELUDE + "hide(lambda name: name == 'pyarrow')\n"
COMMAND_LINE = "from emodistill.cli import main\nmain(sys.argv[1:])\n"
IMPORT_ALL = """
import importlib, json
missing = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        missing[name] = None
    except ModuleNotFoundError as error:
        missing[name] = (error.name or "").partition(".")[0]
print(json.dumps(missing))
"""


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def package_modules() -> list[str]:
    """Every module of the tree, by its import name."""
    folders = {
        "src/emodistill": "emodistill",
        "src/emodistill/cli": "emodistill.cli",
        **{name: f"emodistill.{name}" for name in ("ensemble", "distill", "export", "benchmarks")},
    }
    modules = set()
    for folder, package in folders.items():
        for path in (ROOT / folder).glob("*.py"):
            modules.add(package if path.stem == "__init__" else f"{package}.{path.stem}")
    return sorted(modules)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


def test_the_lists_above_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def import_names(requirements: list[str]) -> set[str]:
        names = {requirement.split(">")[0].split("=")[0].strip().replace("-", "_") for requirement in requirements}
        return {"sklearn" if name == "scikit_learn" else name for name in names}

    assert import_names(project["dependencies"]) == BASE
    assert import_names(project["optional-dependencies"]["train"]) == TRAIN
    assert import_names(project["optional-dependencies"]["parquet"]) == {"pyarrow"}


def test_hidden_packages_are_gone():
    code = "import importlib.util\nprint(importlib.util.find_spec('onnx'))\nimport numpy\nimport onnx"
    done = python(ONLY_BASE + code)
    assert done.stdout == "None\n"
    assert "No module named 'onnx'" in done.stderr


def test_classifier_works_with_the_base_install(bundle):
    done = python(
        ONLY_BASE
        + "from emodistill import Classifier\nprint(Classifier.load(sys.argv[1]).predict(['so sorry', 'ok']))",
        bundle,
    )
    assert done.stderr == ""
    assert done.stdout == "[['remorse'], []]\n"


def test_predict_works_with_the_base_install(bundle, tmp_path):
    done = python(ONLY_BASE + COMMAND_LINE, "predict", "--model", bundle, "--json", "thank you")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["labels"] == ["gratitude"]
    for suffix in ("csv", "tsv", "jsonl"):
        out = tmp_path / f"out.{suffix}"
        given = CASES / "D20_empty_texts.csv"
        done = python(ONLY_BASE + COMMAND_LINE, "predict", "--model", bundle, "--input", given, "--output", out)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["rows"] == 8
        assert out.is_file()


def test_parquet_without_pyarrow_is_one_sentence(bundle, tmp_path):
    given, out = CASES / "D20_empty_texts.csv", tmp_path / "out.parquet"
    done = python(ONLY_BASE + COMMAND_LINE, "predict", "--model", bundle, "--input", given, "--output", out)
    assert done.returncode == 2
    assert done.stderr == (
        "emodistill: this needs 'pyarrow', which is not installed: run  pip install 'emodistill[parquet]'\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_help_and_check_work_with_the_base_install():
    done = python(ONLY_BASE + COMMAND_LINE, "--help")
    assert done.returncode == 0, done.stderr
    assert "predict" in done.stdout
    done = python(ONLY_BASE + COMMAND_LINE, "check", CASES / "D20_empty_texts.csv")
    assert "Traceback" not in done.stderr
    assert "8" in done.stdout


def test_training_without_its_extra_is_one_sentence(tmp_path):
    rows = "".join(f"text number {i},{i % 2},{(i + 1) % 2}\n" for i in range(40))
    (tmp_path / "train.csv").write_text("text,love,pride\n" + rows, encoding="utf-8")
    done = python(ONLY_BASE + COMMAND_LINE, "run", "--train", tmp_path / "train.csv", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("which is not installed: run  pip install 'emodistill[train]'")
    assert "Traceback" not in done.stderr


def test_modules_import_with_the_base_install_or_miss_the_train_extra():
    done = python(ONLY_BASE + IMPORT_ALL, *package_modules())
    assert done.returncode == 0, done.stderr
    missing = json.loads(done.stdout)
    assert {name for name in CORE if missing.get(name, "not found") is not None} == set()
    # What does not import misses a package of the train extra: not pyarrow, nor one that nobody declares.
    assert {name: package for name, package in missing.items() if package not in TRAIN | {None}} == {}


def test_every_module_imports_with_the_train_extra_alone():
    pytest.importorskip("tensorflow", reason="needs the train extra")
    done = python(NO_PARQUET + IMPORT_ALL, *package_modules())
    assert done.returncode == 0, done.stderr
    missing = json.loads(done.stdout.splitlines()[-1])
    assert {name: package for name, package in missing.items() if package is not None} == {}
