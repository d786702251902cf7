"""Test that docs/cli.md is the page that the parsers of dmfast/cli.py make, and docs/glossary.md that of the words."""

from __future__ import annotations

import types

import of_scripts
import pytest


@pytest.fixture(scope="module")
def docs_cli() -> types.ModuleType:
    return of_scripts.load("docs_cli")


def test_the_page_is_what_the_parsers_make(docs_cli: types.ModuleType) -> None:
    assert docs_cli.PAGE.read_text(encoding="utf-8") == docs_cli.page(), "run python scripts/docs_cli.py"


def test_every_command_and_argument_is_there_and_explained(docs_cli: types.ModuleType) -> None:
    found = docs_cli.commands()
    assert {"demo", "train", "report", "bench", "serve-proposal", "doctor"} <= found.keys()
    page = docs_cli.page()
    for name, (about, parser) in found.items():
        part = page.split(f"\n## dmfast {name}\n")[1].split("\n## ")[0]
        assert about and f"`dmfast {name}`" in page.split("\n## ")[0]
        for action in docs_cli.arguments(parser):
            assert action.help, (name, action.dest)
            for word in action.option_strings:
                assert f"`{word}" in part or f", {word}" in part, (name, word)
    assert [each.option_strings for each in docs_cli.arguments(found["bench"][1])].count(["--model"]) == 1


def test_the_glossary_is_that_of_the_report() -> None:
    script = of_scripts.load("docs_glossary")
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.page(), "run python scripts/docs_glossary.py"
    assert all(line.count(" | ") == 1 for line in page.split("| --- | --- |\n")[1].splitlines())
    assert "| q | The proposal: " in page and page.count("\n| ") == len(script.WORDS) + 2
