"""Write docs/cli.md, the page of the command line, from the parsers of dmfast/cli.py.

    python scripts/docs_cli.py

tests/test_docs_cli.py compares the page with the parsers, so that it can't go stale.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from dmfast import cli

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
_BEFORE = """# Command line

This page lists the commands and their arguments. `dmfast COMMAND --help` shows the same. `scripts/docs_cli.py` makes
the page from the parsers.

| command | what it does |
| --- | --- |
"""


def commands() -> dict[str, tuple[str, argparse.ArgumentParser]]:
    """Return what each command does, and its parser, by its name."""
    found = {}
    for name in _subparsers(cli._parser("")).choices:
        # the parser of a command is whole only if it was asked for
        subparsers = _subparsers(cli._parser(name))
        about = next(each.help for each in subparsers._choices_actions if each.dest == name)
        found[name] = (about or "", subparsers.choices[name])
    return found


def _subparsers(parser: argparse.ArgumentParser) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    return next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the arguments of a command but ``--help``."""
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def page() -> str:
    """Return the page."""
    found = commands()
    lines = [f"| [`dmfast {name}`](#dmfast-{name}) | {_cell(about)} |" for name, (about, _) in found.items()]
    parts = [_BEFORE + "\n".join(lines)]
    for name, (about, parser) in found.items():
        parts.append(f"## dmfast {name}\n\n{_sentence(about)}")
        given = arguments(parser)
        words = [_metavar(action) for action in given if not action.option_strings]
        usage = " ".join(["dmfast", name, *words, *["[OPTIONS]"] * any(action.option_strings for action in given)])
        parts.append(f"Usage: `{usage}`")
        if given:
            rows = [f"| `{_names(action)}` | {_meaning(action)} | {_default(action)} |" for action in given]
            parts.append("\n".join(["| argument | meaning | default |", "| --- | --- | --- |", *rows]))
        if parser.epilog:
            parts.append(parser.epilog)
    return "\n\n".join(parts) + "\n"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("%%", "%").replace("|", "\\|")


def _meaning(action: argparse.Action) -> str:
    # the default has a column of its own
    return re.sub(r" \(default (%\(default\)s|[^)]*)\)", "", _cell(action.help or ""))


def _metavar(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        return action.metavar
    return "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()


def _names(action: argparse.Action) -> str:
    names = ", ".join(action.option_strings)
    if not names:
        return _metavar(action) + (" ..." if action.nargs in ("+", "*") else "")
    value = "" if action.nargs == 0 else f" [{_metavar(action)}]" if action.nargs == "?" else f" {_metavar(action)}"
    return names + value


def _default(action: argparse.Action) -> str:
    default = action.default
    nothing = default is None or default is False or default in ("", []) or not action.option_strings
    return "" if nothing else f"`{default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
