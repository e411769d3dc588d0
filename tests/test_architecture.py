"""The house: imports point to lower floors only, JAX internals are touched in one file, docstrings run."""

import ast
import doctest
import importlib
import os
import pathlib
import subprocess
import sys

import jax
import pytest

import jaxq

ROOT = pathlib.Path(jaxq.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
FLOORS = ["numbers", "programs", "decisions", "lowering", "interpretation", "integer", "measure", "io", "report", "cli"]


def _floor(path: pathlib.Path) -> int:
    parts = path.relative_to(ROOT).parts
    return FLOORS.index(parts[0]) if len(parts) > 1 else len(FLOORS)


def _imports(path: pathlib.Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "jaxq" and len(parts) > 1 and parts[1] in FLOORS:
            assert FLOORS.index(parts[1]) <= _floor(path), f"{path} imports {name} from a higher floor"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_jax_internals_are_touched_in_one_file(path):
    for name in _imports(path):
        assert not name.startswith("jax._src"), f"{path} imports {name}"
        if path.name != "jaxpr.py":
            assert not name.startswith(("jax.extend", "jax.interpreters")), f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node, clean=False) or ""
            assert node.end_lineno - node.lineno - doc.count("\n") <= 50, node.name


MODULES = [".".join(("jaxq", *p.relative_to(ROOT).with_suffix("").parts)) for p in FILES if p.name != "__init__.py"]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    with jax.numpy_rank_promotion("allow"):
        assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_everything_public_has_a_runnable_example():
    public = [name for name in vars(jaxq) if not name.startswith("_") and callable(getattr(jaxq, name))]
    assert len(public) >= 20
    missing = [name for name in public if ">>>" not in (getattr(jaxq, name).__doc__ or "")]
    assert missing == []


IMPORT_PROBE = """
import time, jax, numpy
start = time.process_time()
import jaxq
print(time.process_time() - start)
"""


def test_import_is_quick():
    # As anybody imports it a second time, from bytecode; the processor's time, whatever else it does meanwhile.
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def probe() -> float:
        command = [sys.executable, "-c", IMPORT_PROBE]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, env=surroundings).stdout)

    assert min(probe() for _ in range(4)) <= 0.3
