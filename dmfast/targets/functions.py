"""Find the function that a recipe names by ``module:name``, or by ``file.py:name`` if the file is not a module."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast


class FunctionOfFile:
    """A function of a file that is not a module. It can be pickled, so that worker processes load the file too.

    Args:
        path: the file, relative to the working directory.
        name: the name of the function.

    Raises:
        ValueError: the file can't be loaded, or has no such function.
    """

    def __init__(self, path: str, name: str) -> None:
        self.path, self.__name__ = str(Path(path).expanduser().resolve()), name
        self.__qualname__, self.__module__ = name, Path(path).stem
        self._load()

    def _load(self) -> None:
        # the path is in the name, because two files may have the same name
        module_name = f"dmfast_recipe_{hashlib.blake2b(self.path.encode(), digest_size=8).hexdigest()}"
        if module_name not in sys.modules:
            spec = importlib.util.spec_from_file_location(module_name, self.path)
            if spec is None or spec.loader is None or not Path(self.path).is_file():
                raise ValueError(f"there is no Python file {self.path}")
            module = importlib.util.module_from_spec(spec)
            sys.modules[module_name] = module  # before it runs, because dataclasses look a module up there
            try:
                spec.loader.exec_module(module)
            except Exception as error:
                del sys.modules[module_name]
                raise ValueError(f"{self.path} can't be loaded: {type(error).__name__}: {error}") from error
        self._function = getattr(sys.modules[module_name], self.__name__, None)
        if not callable(self._function):
            raise ValueError(f"{self.path} has no function {self.__name__!r}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return cast(Any, self._function)(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return FunctionOfFile, (self.path, self.__name__)


def function_at(path: Any) -> Callable[..., Any]:
    """Return the function that ``module:name`` or ``file.py:name`` names.

    Raises:
        ValueError: the string has another form, or there is no such module, file or function.
    """
    module, _, name = str(path).rpartition(":")
    if not (module and name):
        raise ValueError(f"function must be 'module:name' or 'file.py:name', got {path!r}")
    if module.endswith(".py"):
        return FunctionOfFile(module, name)
    try:
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise ValueError(f"can't import {path!r}: {error}") from error
