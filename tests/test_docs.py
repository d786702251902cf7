"""Every code block of README.md, docs/*.md and docs/guide/*.md runs, and every example of a docstring.

Blocks of a page run in order, in one namespace and one empty folder:

    python   runs. What is printed is kept for a text block after it.
    text     what the last python block of the page printed has these lines in this order, whatever their numbers.
    yaml     a recipe, checked by ``recipe.read``; what it lacks of model, constraints and train is put in.
    sh       dmfast commands are parsed, their recipe and overrides read; make targets, extras and scripts must exist.

HTML comments before a block, invisible to readers, make it small or name it:

    <!-- test: run                 Python that runs before the block, up to the line with the end of the comment
    <!-- test: replace A => B -->  the block runs with B in the place of A, which must be in it; ROOT is the repository
    <!-- test: file NAME -->       the yaml block is written to this file, for an sh block to find
    <!-- test: needs NAME -->      the python block runs where this package is installed, as in `make NAME`

Examples in docstrings are doctest's.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import io
import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import of_scripts
import pytest
import yaml

import dmfast
from dmfast import cli, demo
from dmfast.objectives import OBJECTIVES
from dmfast.training import recipe

ROOT = Path(__file__).parent.parent
# There are no pages if the tests run beside an installed wheel.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if (ROOT / "pyproject.toml").exists() else []
BLOCK = re.compile(
    r"(?P<comments>(?:^<!-- test: (?:(?!-->).)*-->\n)*)^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
COMMENT = re.compile(r"<!-- test: (\w+)\s(.*?)\s*-->", re.S)
NUMBER = re.compile(r"-?\b(\d[\d,]*(\.\d*)?(e[+-]?\d+)?|nan)\b")
LACKING = {
    "model": "tiny-bios",
    "constraints": [{"contains": {"word": "amazing"}}],
    "train": {"max_steps": 1},
}

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")


@dataclass(repr=False)
class Block:
    language: str
    code: str
    line: int  # the line of the page where the code begins
    comments: list[tuple[str, str]]

    @property
    def ready(self) -> str:
        """Return the code with what the comments replace."""
        code = self.code
        for kind, text in self.comments:
            if kind == "replace":
                old, new = text.split(" => ")
                assert old in code, f"nothing to replace: {old}"
                code = code.replace(old, new.replace("ROOT", str(ROOT)))
        return code

    @property
    def missing(self) -> list[str]:
        """Return the packages that the block needs and that are not installed."""
        return [name for name in self.named("needs") if importlib.util.find_spec(name) is None]

    def named(self, kind: str) -> list[str]:
        return [text for each, text in self.comments if each == kind]


@dataclass(repr=False)
class Page:
    path: Path
    blocks: list[Block]
    folder: Path  # the folder where its blocks run
    names: dict[str, Any] = field(default_factory=dict)
    printed: str = ""
    done: int = 0

    def run(self, number: int) -> None:
        """Run a block, and before it those of the page that have not run."""
        while self.done <= number:
            block, self.done = self.blocks[self.done], self.done + 1
            getattr(self, f"run_{block.language or 'nothing'}")(block)

    def run_python(self, block: Block) -> None:
        if block.missing:
            return
        for code in block.named("run"):
            exec(compile(code, f"{self.path}, before line {block.line}", "exec"), self.names)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("\n" * (block.line - 1) + block.ready, str(self.path), "exec"), self.names)
        self.printed = out.getvalue()

    def run_text(self, block: Block) -> None:
        lines = iter([shape(line) for line in self.printed.splitlines()])
        for line in block.code.splitlines():
            assert shape(line) in lines, f"not printed, or not in this order: {line}\nprinted:\n{self.printed}"

    def run_yaml(self, block: Block) -> None:
        entries = yaml.safe_load(block.ready)
        path = Path(*block.named("file") or ["recipe.yaml"])
        path.write_text(yaml.safe_dump(LACKING | entries))
        assert entries.items() <= recipe.read(path).items()

    def run_sh(self, block: Block) -> None:
        for line in block.ready.splitlines():
            program, *words = shlex.split(line, comments=True)
            getattr(self, f"check_{program}")(words)

    def check_dmfast(self, words: list[str]) -> None:
        args = cli._parser(complete=words[0]).parse_args(words)
        if args.command == "train":
            recipe.read(find(args.recipe), dict(args.overrides))

    def check_make(self, words: list[str]) -> None:
        assert set(words) <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))

    def check_pip(self, words: list[str]) -> None:
        assert words[0] == "install"
        assert "." in {word.split("[")[0] for word in words}
        extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
        wanted = {extra for word in words for extra in re.findall(r"\[(.+)\]", word)}
        assert wanted <= set(re.findall(r"^(\w+) = ", extras, re.M))

    def check_python(self, words: list[str]) -> None:
        assert find(words[0]).is_file()
        if words[0] == "examples/custom_loop.py":
            demo.loop_parser().parse_args(words[1:])


def find(path: str) -> Path:
    """Return a file that the page has made, or one of the repository."""
    return Path(path) if Path(path).exists() else ROOT / path


def shape(line: str) -> str:
    """Return a line without its numbers and widths."""
    return " ".join(NUMBER.sub("0", line).split())


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = [
        Block(m["language"], m["code"], text.count("\n", 0, m.start("code")) + 1, COMMENT.findall(m["comments"]))
        for m in BLOCK.finditer(text)
    ]
    assert 2 * len(found) == len(re.findall(r"^\s*```", text, re.M)), f"{path}: a block that is not recognised"
    assert sum(len(block.comments) for block in found) == text.count("<!-- test"), f"{path}: a comment of no block"
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return {path: Page(path, blocks(path), tmp_path_factory.mktemp(path.stem)) for path in PAGES}


@pytest.mark.parametrize(
    ("path", "number"),
    [pytest.param(p, i, id=f"{p.stem}-line{b.line}-{b.language}") for p in PAGES for i, b in enumerate(blocks(p))],
)
def test_block(pages, path, number, monkeypatch):
    monkeypatch.chdir(pages[path].folder)
    page = pages[path]
    if page.blocks[number].missing:
        pytest.skip(f"{page.blocks[number].missing[0]} is not installed")
    page.run(number)


@pytest.mark.skipif(not PAGES, reason="no docs beside the tests")
def test_the_guide_explains_every_number_of_a_log(pages, monkeypatch):
    page = pages[ROOT / "docs" / "guide" / "reading-a-run.md"]
    monkeypatch.chdir(page.folder)
    page.run(0)
    of_transformers = {"epoch", "step", "learning_rate", "grad_norm", "total_flos", "eval_runtime"}
    named = re.findall(r"`([^`\n]+)`", page.path.read_text(encoding="utf-8"))
    explained = {name.rstrip("…") for name in named if name.endswith("…")}, set(named)
    short = {"eval_distinct_2": "_2", "eval_distinct_3": "_3"}
    for logged in page.names["trainer"].state.log_history:
        for key in logged.keys() - of_transformers:
            name = key.removesuffix("_stderr")
            if not name.startswith("train_"):
                assert short.get(name, name) in explained[1] or name.startswith(tuple(explained[0])), key


FEATURES = {
    row[1].strip(): row[3].strip()
    for page in PAGES if page.stem == "features"
    for row in (line.split("|") for line in page.read_text(encoding="utf-8").split("\n") if line.startswith("| "))
    if row[1].strip() != "feature"
}  # fmt: skip
OF_FEATURES = json.loads((Path(__file__).parent / "features.json").read_text(encoding="utf-8"))


@pytest.mark.skipif(not PAGES, reason="no docs beside the tests")
def test_the_tests_of_features_are_those_of_the_page():
    assert list(OF_FEATURES) == list(FEATURES)


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_has_its_test_and_a_page_to_read(feature):
    file, _, name = OF_FEATURES[feature].partition("::")
    if name:
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.M), name
    else:
        proofs = re.search(r"^PROOFS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert proofs and file.removeprefix("make ") in proofs[1].split(), file
    assert re.match(r"\[.+\]\(.+\.md(#.+)?\)", FEATURES[feature])  # test_links_lead_somewhere checks where to


@pytest.mark.parametrize("path", [*PAGES, *([ROOT / "CONTRIBUTING.md"] if PAGES else [])], ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, heading = target.partition("#")
        if file.startswith("http"):
            continue
        to = path.parent / file if file else path
        assert to.exists(), target
        titles = re.findall(r"^#+ (.+)$", to.read_text(encoding="utf-8"), re.M) if heading else []
        anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not heading or heading in anchors, target


PACKAGE = Path(dmfast.__file__).parent
EXAMPLES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_of_docstrings(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    failed, tried = doctest.testmod(importlib.import_module(".".join(parts)))
    assert tried > 0
    assert failed == 0


@pytest.mark.skipif(not PAGES, reason="no docs beside the tests")
def test_the_api_reference_has_every_public_name():
    pages = of_scripts.load("docs_site").api_pages()
    shown = [name for page in pages.values() for name in re.findall(r"^::: (dmfast\.[\w.]+)$", page, re.M)]
    assert sorted(name for name in shown if name.count(".") == 1) == sorted(f"dmfast.{name}" for name in dmfast.__all__)
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    index = pages.pop("docs/api/index.md")
    linked = re.findall(r"\((\w+\.md)#(dmfast\.[\w.]+)\)", index)
    assert sorted(name for _, name in linked) == sorted(shown)
    for page, name in linked:
        assert f"::: {name}\n" in pages[f"docs/api/{page}"]


@pytest.mark.skipif(not PAGES, reason="no docs beside the tests")
def test_the_site_shows_formulas_and_lets_the_code_of_tables_break():
    shown = of_scripts.load("docs_site").on_page_content
    assert shown("<p>E_q[u^(1−α)] of x_i&lt;t, log_z</p>") == (
        "<p>E<sub>q</sub>[u<sup>1−α</sup>] of x<sub>i&lt;t</sub>, log_z</p>"
    )
    assert shown("<p>w^k e^(c (1 - w))</p>") == "<p>w<sup>k</sup> e<sup>c (1 - w)</sup></p>"
    for code in ("<code>x_i</code>", '<pre class="a_b"><code>x_i ^ 2\n</code></pre>', '<a href="x_i">one</a>'):
        assert shown(code) == code
    assert shown("<td><code>x_i</code> <code>tests/test_docs.py</code> <code>datasets.Dataset</code></td>") == (
        "<td><code>x_i</code> <code>tests/<wbr>test_<wbr>docs.py</code> <code>datasets.<wbr>Dataset</code></td>"
    )
    assert shown("<th><code>autograd.Function</code></th><td><code>f(max_length, sampler=...)</code></td>") == (
        "<th><code>autograd.<wbr>Function</code></th><td><code>f(max_length, sampler=...)</code></td>"
    )
    assert shown("<td><code>OfflineProposal(sampler=...)</code></td>") == (
        "<td><code>OfflineProposal(<wbr>sampler=...)</code></td>"
    )
    assert shown('<img alt="a" src="b.png">') == '<a href="b.png"><img alt="a" src="b.png"></a>'


@pytest.mark.skipif(not PAGES, reason="no docs beside the tests")
def test_the_method_has_a_row_for_each_objective():
    section = (ROOT / "docs" / "method.md").read_text(encoding="utf-8").split("\n### Objectives")[1].split("\n### ")[0]
    assert sorted(re.findall(r"^\| `(\S+)` \|", section, re.M)) == sorted(OBJECTIVES)


def test_the_model_of_large_policies_is_what_its_script_makes():
    if not PAGES:
        pytest.skip("there is no documentation beside the tests")
    scale = of_scripts.load("scale")
    made = (ROOT / "docs" / "scale.md").read_text().split(scale.MARKS[0])[1].split(scale.MARKS[1])[0]
    assert made == scale.table(), "python scripts/scale.py docs/scale.md brings the page up to date"
