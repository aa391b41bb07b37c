"""Imports run one way, every module says what it offers, and the base install is enough for what it promises."""

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "emodistill": "src/emodistill",
    "emodistill.ensemble": "ensemble",
    "emodistill.distill": "distill",
    "emodistill.export": "export",
    "emodistill.benchmarks": "benchmarks",
}
STAGES = ("ensemble", "distill", "export")
BASE = {"numpy", "onnxruntime", "tokenizers", "click"}
RUNTIME = {"numpy", "onnxruntime", "tokenizers"}
TRAIN = {
    "google",
    "matplotlib",
    "onnx",
    "safetensors",
    "scipy",
    "sklearn",
    "tensorflow",
    "tensorflow_model_optimization",
    "tf2onnx",
    "tf_keras",
    "threadpoolctl",
    "transformers",
}
PARQUET = {"pyarrow"}
INSPECT = {"cleanlab"}
OF_OTHERS = {"huggingface_hub"}  # comes with tokenizers and transformers; imported only where its absence is handled
# What an edge machine and a reader of files must be able to import with the base install alone.
PROMISED_TO_BASE = ("emodistill", "emodistill.errors", "emodistill.data", "emodistill.runtime", "emodistill.cli")


@dataclass(frozen=True)
class Import:
    """One import: the full name it asks for, its line, and whether it runs when the module is imported."""

    name: str
    line: int
    at_import: bool


def modules() -> dict[str, Path]:
    """Name and file of every module of the package, wherever its folder lies."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if package == "emodistill.benchmarks" and len(parts) > 1:
                continue  # benchmarks/peers: scripts of another environment
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join((package, *parts))] = path
    return found


MODULES = modules()


def read_imports(source: str, module: str, is_package: bool = False) -> list[Import]:
    """List every import of a module, those written as import_module("...") included."""
    found: list[Import] = []

    def visit(node: ast.AST, at_import: bool) -> None:
        for child in ast.iter_child_nodes(node):
            runs = at_import and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                runs = False
            if isinstance(child, ast.Import):
                found.extend(Import(alias.name, child.lineno, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                source_name = child.module or ""
                if child.level:
                    above = module.split(".")[: len(module.split(".")) - child.level + is_package]
                    source_name = ".".join([*above, *([child.module] if child.module else [])])
                for alias in child.names:
                    whole = f"{source_name}.{alias.name}"
                    name = whole if whole in MODULES else source_name
                    found.append(Import(name, child.lineno, at_import))
            elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
                names = [a.value for a in child.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                found.extend(Import(name, child.lineno, at_import) for name in names)
            visit(child, runs)

    visit(ast.parse(source), True)
    return found


IMPORTS = {name: read_imports(path.read_text(), name, path.name == "__init__.py") for name, path in MODULES.items()}


def layer(module: str) -> str:
    """Return core, ensemble, distill, export, benchmarks or cli."""
    second = ([*module.split("."), ""])[1]
    return second if second in (*STAGES, "benchmarks", "cli") else "core"


def objection(importer: str, wanted: Import) -> str | None:
    """Say what is wrong with an import inside the package, or None."""
    source, target = layer(importer), layer(wanted.name)
    if source == target or target == "core":
        return None
    if source == "cli":
        return "import it inside the command that needs it" if wanted.at_import else None
    if source == "benchmarks":
        return "nothing imports cli" if target == "cli" else None
    return f"{source} must not import {target}"


def third_party(module: str) -> set[str]:
    """Top-level names that importing `module` loads from outside the standard library, followed through our own."""
    seen: set[str] = set()
    names: set[str] = set()
    todo = [module]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        parents = [".".join(current.split(".")[:n]) for n in range(1, current.count(".") + 1)]
        todo.extend(parents)
        for wanted in IMPORTS.get(current, []):
            top = wanted.name.split(".")[0]
            if not wanted.at_import:
                continue
            if top == "emodistill":
                todo.append(wanted.name)
            elif top not in sys.stdlib_module_names:
                names.add(top)
    return names


def test_the_scan_sees_the_package() -> None:
    assert {"emodistill", "emodistill.errors", *(f"emodistill.{s}" for s in STAGES)} <= MODULES.keys()


def test_the_scan_tells_good_imports_from_bad() -> None:
    source = (
        "import numpy as np\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import onnx\n"
        "from emodistill import export\n"
        "class A:\n    import click\n"
        "def f():\n    from ..distill import NAME\n    import_module('emodistill.cli')\n"
    )
    found = read_imports(source, "emodistill.ensemble.weights")
    assert [(i.name, i.line, i.at_import) for i in found] == [
        ("numpy", 1, True),
        ("typing", 2, True),
        ("onnx", 4, False),
        ("emodistill.export", 5, True),
        ("click", 7, True),
        ("emodistill.distill", 9, False),
        ("emodistill.cli", 10, False),
    ]
    inside = [objection("emodistill.ensemble.weights", i) for i in found if i.name.startswith("emodistill")]
    assert inside == [
        "ensemble must not import export",
        "ensemble must not import distill",
        "ensemble must not import cli",
    ]
    assert objection("emodistill.data", found[3]) == "core must not import export"
    assert objection("emodistill.cli.run", found[3]) == "import it inside the command that needs it"
    assert objection("emodistill.cli.run", found[5]) is None
    assert objection("emodistill.benchmarks.latency", found[3]) is None
    assert objection("emodistill.benchmarks.latency", found[6]) == "nothing imports cli"


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    inside = [i for i in IMPORTS[module] if i.name.split(".")[0] == "emodistill"]
    wrong = [
        f"{MODULES[module].relative_to(ROOT)}:{i.line}: {i.name}: {why}"
        for i in inside
        if (why := objection(module, i))
    ]
    assert wrong == []


@pytest.mark.parametrize("module", MODULES)
def test_third_parties_are_those_of_pyproject(module: str) -> None:
    allowed = {*sys.stdlib_module_names, "emodistill", *BASE, *TRAIN, *PARQUET, *INSPECT, *OF_OTHERS}
    strangers = [f"line {i.line}: {i.name}" for i in IMPORTS[module] if i.name.split(".")[0] not in allowed]
    assert strangers == []


def test_nothing_loads_pyarrow_or_the_hub_on_import() -> None:
    assert [m for m in MODULES if third_party(m) & (PARQUET | INSPECT | OF_OTHERS)] == []


def test_runtime_needs_three_packages() -> None:
    assert third_party("emodistill.runtime") <= RUNTIME
    anywhere = {i.name.split(".")[0] for i in IMPORTS["emodistill.runtime"]} - set(sys.stdlib_module_names)
    assert anywhere - {"emodistill"} <= RUNTIME


@pytest.mark.parametrize("module", PROMISED_TO_BASE)
def test_promised_modules_need_the_base_install_only(module: str) -> None:
    assert module in MODULES
    assert third_party(module) - BASE == set()


def export_key(name: str) -> tuple[int, list[int | str]]:
    """Order of ruff's RUF022: CONSTANTS, Classes, then the rest; numbers by value."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    return kind, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def names_at_top(tree: ast.Module) -> set[str]:
    """Names that a module binds at its top level."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and node in tree.body:
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
        elif isinstance(node, ast.TypeAlias) if sys.version_info >= (3, 12) else False:
            names.add(node.name.id)
    return names


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_offers(module: str) -> None:
    if module.endswith("__main__"):
        return
    tree = ast.parse(MODULES[module].read_text())
    lists = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    if MODULES[module].name == "__init__.py" and not names_at_top(tree):
        return  # a package that only holds modules
    assert len(lists) == 1, "one __all__ per module"
    (offered,) = lists
    assert offered == sorted(set(offered), key=export_key)
    assert set(offered) - names_at_top(tree) == set(), "in __all__ and not in the module"


def run_without(blocked: set[str], names: list[str]) -> subprocess.CompletedProcess[str]:
    """Import `names` in a new process in which the `blocked` packages cannot be imported."""
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from importlib import import_module\n"
        f"for name in {names!r}:\n"
        "    import_module(name)\n"
        "import emodistill\n"
        "print(len(emodistill.__all__), sorted(m for m in sys.modules if m == 'tensorflow'))\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_base_modules_import_where_the_extras_are_absent() -> None:
    base = [m for m in MODULES if third_party(m) <= BASE and not m.endswith("__main__")]
    assert len(base) >= 5
    done = run_without(TRAIN | PARQUET | {"torch", "pandas"}, base)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "3 []\n"


def test_all_modules_import_with_the_train_extra() -> None:
    if find_spec("tensorflow") is None:
        pytest.skip("needs the train extra")
    names = [m for m in MODULES if not m.endswith("__main__")]
    done = run_without(PARQUET | {"torch", "pandas", "sympy"}, names)
    assert done.returncode == 0, done.stderr[-2000:]
