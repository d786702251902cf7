"""Read the text of recipes and of the values that replace their entries."""

from __future__ import annotations

import json
import re
from typing import Any


def of_yaml(text: str) -> Any:
    """Return what a YAML text holds. A number such as 1e-4 is a number, although YAML 1.1 has no such numbers.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return yaml.load(text, Loader)  # a SafeLoader, which makes no objects


def of_command_line(text: str) -> Any:
    """Return the value that a word of a command line gives: JSON, or YAML with brackets or quotes, or else the text.

    A bare word stays text, as the ``no`` of ``train.save_strategy=no``, which YAML 1.1 reads as False. Only True, False
    and null, in upper or lower case, are not text.

    Raises:
        ValueError: it begins with a bracket, a brace or a quotation mark, and is not YAML.
    """
    import yaml

    try:
        return json.loads(text)
    except ValueError:
        pass
    if text.lower() not in ("true", "false", "null") and not text.startswith(("[", "{", "'", '"')):
        return text
    try:
        return of_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is not YAML: {error}") from error
