"""Make a site of the repository, as the hook of mkdocs.yml.

A page lies where its file lies in the repository, so that a relative link leads to the same place on the site as in the
tree. The API reference is made of ``dmfast.__all__`` and ``BY_MODULE``.
"""

from __future__ import annotations

import ast
import re
from html import unescape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = ("*.md", "docs/*.md", "docs/guide/*.md", "benchmarks/**/*.md", "dmfast/data/**/*.md")
API = "docs/api"
# these public names are imported from their modules, and not from dmfast
BY_MODULE = {
    "batch": ["Batch", "Microbatch"],
    "diagnostics": ["distinct_n", "self_bleu", "gradient_variance", "GradientVariance", "weight_statistics"],
    "estimators": [
        "PartitionFunction", "PartitionFunctions", "RunningEstimates", "Estimate", "Estimates", "estimate",
        "estimate_log_z", "estimate_moments", "effective_sample_size",
    ],
    "functional": ["sample_tokens", "DMLossOutput"],
    "kernels": ["use_backend", "BackendInfo"],
    "log_probs": ["dm_loss_from_log_probs"],
    "models": ["AdapterView"],
    "objectives": ["OBJECTIVES", "AdaptiveBeta", "PPOClip", "leave_one_out"],
    "ranks": ["Ranks"],
    "rejection": ["quasi_rejection_sample", "rejection_curve", "RejectionCurve", "RejectionPoint", "plot_rejection"],
    "samples": ["Samples"],
    "sampling": [
        "Sampler", "AsyncSampler", "ProcessSampler", "Mixture", "Prompted", "HTTPSampler", "VLLMSampler", "EngineError",
    ],
    "methods": ["trajectory_balance", "vargrad", "maxrl", "gspo", "vespo", "grpo", "dapo", "DrGRPO"],
    "presets": ["PRESETS", "Preset"],
    "verified": ["pass_at_k", "maj_at_k", "coverage", "distinct_at_k", "measure"],
    "targets": ["Feature", "ScorerCounts", "VerifierCounts", "TargetScores", "fit_lambda", "LambdaFit"],
}  # fmt: skip
# the pages of these classes also show what they inherit
WITH_INHERITED = ("dmfast.LanguageModel",)
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def public_names() -> dict[str, list[str]]:
    """Return the public names by the module that they come from, each as it is imported.

    ``dmfast.dm_loss`` is of ``dmfast.__all__``, in the order of the imports. After these come names of ``BY_MODULE``,
    such as ``dmfast.estimators.estimate``.
    """
    tree = ast.parse((ROOT / "dmfast" / "__init__.py").read_text(encoding="utf-8"))
    public: list[str] = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
    )
    found: dict[str, list[str]] = {}
    # a walk also finds the imports that only type checkers see
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            for name in (alias.asname or alias.name for alias in node.names if (alias.asname or alias.name) in public):
                # the other form is: from . import eager
                module = node.module.split(".")[0] if node.module else name
                found.setdefault(module, []).append(f"dmfast.{name}")
    for module, names in BY_MODULE.items():
        found.setdefault(module, []).extend(f"dmfast.{module}.{name}" for name in names)
    return {module: names for module, names in found.items() if names}


def api_pages() -> dict[str, str]:
    """Return the Markdown of a page for each module, and of their index, by the path on the site."""
    pages, public = {}, public_names()
    about = "This page lists every public name by its module, under the name by which it is imported."
    index = ["# API reference", "", about, ""]
    for module, names in public.items():
        path = ROOT / "dmfast" / f"{module}.py"
        source = path if path.exists() else path.with_suffix("") / "__init__.py"
        about = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
        blocks = [f"::: {name}\n    options:\n      show_root_full_path: true" for name in names]
        blocks = [
            block + "\n      inherited_members: true" * (name in WITH_INHERITED)
            for name, block in zip(names, blocks, strict=True)
        ]
        if names == [f"dmfast.{module}"]:  # the module itself is the public name, and its docstring says what it has
            about, blocks = "", [f"{blocks[0]}\n      members: false"]
        pages[f"{API}/{module}.md"] = "\n\n".join([f"# {module}", about, *blocks]) + "\n"
        links = ", ".join(f"[{name.removeprefix('dmfast.')}]({module}.md#{name})" for name in names)
        index.append(f"- [{module}]({module}.md): {links}")
    pages[f"{API}/index.md"] = "\n".join(index) + "\n"
    return pages


def on_config(config: Any) -> Any:
    """Put the API pages where the navigation has a title for them."""
    for entry in config.nav:
        if "API" in entry:
            entry["API"] = [f"{API}/index.md", *(f"{API}/{module}.md" for module in public_names())]
    return config


def pages_and_files() -> tuple[dict[str, str], list[Path]]:
    """Return the files of the site, and the Markdown of a page for each linked folder that has no README, by its path.

    The files are the pages, what they link to, and the files of a folder that they link to.
    """
    assets = {path for path in (ROOT / "docs" / "assets").rglob("*") if path.is_file()}
    found = {path for pattern in PAGES for path in ROOT.glob(pattern)} | assets
    listings = {}
    for page in sorted(path for path in found if path.suffix == ".md"):
        for link, _ in LINK.findall(page.read_text(encoding="utf-8")):
            target = (page.parent / link).resolve()
            files = sorted(path for path in target.iterdir() if path.is_file()) if target.is_dir() else [target]
            found.update(path for path in files if path.is_file())  # mkdocs says what is not there
            if target.is_dir() and not (target / "README.md").exists():
                lines = [f"# {target.relative_to(ROOT)}", "", *(f"- [{path.name}]({path.name})" for path in files)]
                listings[f"{target.relative_to(ROOT)}/index.md"] = "\n".join(lines) + "\n"
    return listings, sorted(found)


def on_files(files: Any, config: Any) -> Any:
    """Return the files of the site, each under its path in the repository."""
    from mkdocs.structure.files import File, Files

    theme = [file for file in files if file.src_dir != config.docs_dir]
    listings, found = pages_and_files()
    copies = [File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)) for path in found]
    pages = [File.generated(config, path, content=content) for path, content in (api_pages() | listings).items()]
    return Files([*theme, *copies, *pages])


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leave out the comments for tests/test_docs.py, and let a link to a folder lead to its page."""

    def leads(link: re.Match[str]) -> str:
        folder = (ROOT / page.file.src_uri).parent / link[1]
        if not folder.is_dir():
            return link[0]
        return f"]({link[1].rstrip('/')}/{'README' if (folder / 'README.md').exists() else 'index'}.md{link[2] or ''})"

    return LINK.sub(leads, re.sub(r"^<!-- test: .*?-->\n", "", markdown, flags=re.MULTILINE | re.DOTALL))


def on_page_content(html: str, **_: Any) -> str:
    """Set subscripts and superscripts of formulas, link pictures to their files, and let the code of tables break.

    Code breaks behind a punctuation mark, so that a narrow column keeps whole words.
    """
    parts = re.split(r"(<pre.*?</pre>|<code.*?</code>|<[^>]+>)", html, flags=re.DOTALL)
    parts[::2] = [formulas(text) for text in parts[::2]]  # every second part is a tag or code
    html = re.sub(r'<img [^>]*src="([^"]+)"[^>]*>', r'<a href="\1">\g<0></a>', "".join(parts))
    cells = r"<t([dh])\b.*?</t\1>"
    return re.sub(cells, lambda cell: re.sub(r"(?<=<code>)[^<]+", breakable, cell[0]), html, flags=re.DOTALL)


def formulas(text: str) -> str:
    """Return the HTML of a text with ``E_q``, ``x_i<t``, ``e^y`` and ``u^(1 - t)`` as they are written by hand."""
    text = re.sub(r"(?<!\w)(\w|mean|Cov)_(\w{1,2}(?:&lt;\w)?)(?!\w)", r"\1<sub>\2</sub>", text)
    powers = r"\^\(((?:[^()]|\([^()]*\))+)\)|\^([−-]?\w{1,2})(?!\w)"
    return re.sub(powers, lambda found: f"<sup>{found[1] or found[2]}</sup>", text)


def breakable(code: re.Match[str]) -> str:
    """Return the HTML of a piece of code whose long words may be broken behind a punctuation mark.

    There is no break before the end of a file's name or within an ellipsis, and a short word stays whole.
    """

    def broken(word: re.Match[str]) -> str:
        if len(unescape(word[0]).rstrip(",")) < 16:
            return word[0]
        return re.sub(r"(?<=[_/:=,(])(?=\w)|(?<=\w\.)(?=[a-z]*[A-Z_(]|[a-z]+\.)", "<wbr>", word[0])

    return re.sub(r"\S+", broken, code[0])
