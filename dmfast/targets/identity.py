"""Say in plain values what a feature is made of, so that a later run can tell whether its features are the same.

What can't be told from outside is left out: a lambda, a function inside a function, and arguments that are objects.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

_ONE = (bool, int, float, str, type(None))


def is_plain(value: Any) -> bool:
    """Return whether a value is a number, a string, True, False or None, or a list or mapping of such values."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_plain(each) for key, each in value.items())
    return all(is_plain(each) for each in value) if isinstance(value, (list, tuple)) else isinstance(value, _ONE)


def of_function(fn: Callable[..., Any]) -> dict[str, Any]:
    """Return the module and the name of a function, and the plain arguments that ``functools.partial`` gives it.

    An object that can be called has those of its class.
    """
    if isinstance(fn, functools.partial):
        given = {f"argument {i}": value for i, value in enumerate(fn.args, 1)} | fn.keywords
        return {**of_function(fn.func), "arguments": {name: each for name, each in given.items() if is_plain(each)}}
    named = fn if hasattr(fn, "__qualname__") else type(fn)
    name, module = str(named.__qualname__), getattr(named, "__module__", None)
    if "<" in name:  # <lambda> and <locals>
        return {}
    # the same file is __main__ as a script and has a name of its own as a module
    return {"function": name} if module in (None, "__main__") else {"function": name, "module": module}
