"""Test the layers of ``scripts/architecture.py`` against the imports of the code."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
from pathlib import Path

import of_scripts
import pytest

import dmfast

architecture = of_scripts.load("architecture")
PACKAGE = Path(dmfast.__file__).parent


@pytest.fixture(scope="module")
def of_code():
    return architecture.imports(PACKAGE)


def test_no_import_points_upwards(of_code):
    assert architecture.problems(PACKAGE, of_code) == []


def test_the_drawing_is_that_of_the_code(of_code):
    made = architecture.drawing(PACKAGE, of_code)
    assert architecture.DRAWING.read_text(encoding="utf-8") == made, "python scripts/architecture.py draws it again"
    chain = {(i, i + 1) for i in range(len(architecture.LAYERS) - 1)}
    # docs/architecture.md says that the drawing leaves out the other arrows.
    assert architecture.arrows(of_code) == chain


def imported(path, package):
    """Return the files that a module imports, also for types alone and within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for each in (above, *(above / alias.name for alias in node.names)):
                found |= {file for file in (each.with_suffix(".py"), each / "__init__.py") if file.is_file()}
    # A package imports its modules, which is not a circle: a module of it may import others of the same package.
    return found - {path} - {package / "__init__.py"} - {parent / "__init__.py" for parent in path.parents}


def test_no_modules_import_each_other_in_a_circle():
    graph = {path: imported(path, PACKAGE) for path in PACKAGE.rglob("*.py")}
    assert PACKAGE / "matcher.py" in graph[PACKAGE / "training" / "trainer.py"]
    assert PACKAGE / "kernels" / "batch.py" in graph[PACKAGE / "kernels" / "cpu.py"]
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)


@pytest.fixture
def package(tmp_path):
    """Return a package of three layers.

    top imports middle and bottom, also within a function, and middle imports bottom.
    """
    folder = tmp_path / "dmfast"
    (folder / "middle").mkdir(parents=True)
    (folder / "__init__.py").write_text("from . import top\n")
    (folder / "top.py").write_text("from .middle.part import x\n\ndef f():\n    from . import bottom\n")
    (folder / "middle" / "__init__.py").write_text("")
    (folder / "middle" / "part.py").write_text("from ..bottom import y\nfrom . import other\n")
    (folder / "middle" / "other.py").write_text("import dmfast.bottom\nimport torch\n")
    (folder / "bottom.py").write_text("y = 1\n")
    return folder


LAYERS = tuple(("", "", (name,)) for name in ("top", "middle", "bottom"))


def layers():
    return [architecture.Layer(*layer) for layer in LAYERS]


def test_arrows_that_follow_from_others_are_left_out(package):
    assert {each[:2] for each in architecture.imports(package)} == {
        ("top", "middle"), ("top", "bottom"), ("middle", "bottom")
    }  # fmt: skip
    assert architecture.problems(package, architecture.imports(package), layers()) == []
    assert architecture.arrows(architecture.imports(package), layers()) == {(0, 1), (1, 2)}
    (package / "middle" / "part.py").write_text("")
    (package / "middle" / "other.py").write_text("")
    assert architecture.arrows(architecture.imports(package), layers()) == {(0, 1), (0, 2)}


@pytest.mark.parametrize(
    "line", ["from .top import f", "from . import top", "import dmfast.top", "def f():\n    from dmfast.top import f"]
)
def test_an_import_that_points_upwards_is_named(package, line):
    (package / "bottom.py").write_text(line + "\n")
    (found,) = architecture.problems(package, architecture.imports(package), layers())
    assert found.startswith("dmfast/bottom.py:") and "bottom () imports top (), which is above it" in found


def test_a_module_without_a_layer_is_named(package):
    (package / "new.py").write_text("")
    assert architecture.problems(package, architecture.imports(package), layers()) == [
        "new is in no layer of scripts/architecture.py"
    ]


def of_package(tree):
    """Return (line, module, name) for each name that a script takes from ``dmfast``, as ``dmfast.name`` too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "dmfast":
            found += [(node.lineno, node.module, each.name) for each in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dmfast":
            found.append((node.lineno, "dmfast", node.attr))
    return found


def exists(module, name):
    if module.startswith("dmfast.integrations."):
        return True  # it imports trl or verl, which these tests do without
    held = importlib.import_module(module)
    if hasattr(held, name):
        return True
    return hasattr(held, "__path__") and importlib.util.find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "scripts"])
def test_scripts_take_names_that_the_package_has(folder):
    """No test runs most of these scripts, so a renamed function of the package would break them unseen."""
    missing = [
        f"{path.name}:{line}: {module}.{name}"
        for path in sorted((Path(architecture.__file__).parents[1] / folder).rglob("*.py"))
        for line, module, name in of_package(ast.parse(path.read_text(encoding="utf-8")))
        if not exists(module, name)
    ]
    assert missing == []
