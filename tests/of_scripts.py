"""Load a script of the repository, which belongs to no package, so that tests can call its functions."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


def load(name: str) -> ModuleType:
    """Return the module of ``scripts/<name>.py``, or skip the test where there is no source tree."""
    path = SCRIPTS / f"{name}.py"
    if not path.exists():
        pytest.skip("the scripts are not beside the tests", allow_module_level=True)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # a script imports the modules that lie beside it
    with patch.object(sys, "path", [str(path.parent), *sys.path]):
        spec.loader.exec_module(module)
    return module
