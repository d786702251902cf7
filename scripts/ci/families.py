"""Try every causal architecture of transformers (tests/families.py) and write docs/models.md.

families.py            tries all and writes the page
families.py --check    tries all; fails where one is wrong or crashes, or where the page says otherwise
families.py NAME ...   tries these and prints what was found
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import transformers

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import families  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
FAILURES = ("wrong", "crashes")
TEXT = """\
# Models

dmfast trains the causal language models of transformers: what is drawn from a model is what is scored. This page is
written by `scripts/ci/families.py`, which builds a small random model of every architecture that transformers {version}
lists for causal language modelling and samples from it, with prompts of several lengths and rows that end early. log q
of each sequence, and its log-probability scored together and alone, in training mode and in evaluation mode, agree in
fp32 within 1e-4 nats with plain transformers: each sequence by itself, unpadded, without a cache. The gradient of the
loss agrees within 1e-3 of its largest entry. Dropout and router jitter are on in every configuration.

A model that is not listed, or whose code is its own, is asked when it is first used: `LanguageModel` scores two of its
first samples and refuses with the reason where they differ (`check_scores`).

| | families |
|---|---|
{totals}

- **holds**: as above. *Prompts of one length at a time*: the model counts positions itself or lets padding in, so that
  dmfast runs a forward for each length of a prompt. *Without a cache*: each step of sampling runs the whole sequence,
  and a warning says so.
- **refused**: dmfast raises an error with this reason.
- **not tried**: no small model could be built from its configuration alone, or what was built does not run in plain
  transformers on text alone.

Sparse attention that picks the best keys (DeepSeek V3.2 and its kin, Doge) was tried at lengths below the number that
it picks. Beyond it, two forwards of different shapes may break a tie in two ways.

| family | | |
|---|---|---|
{rows}

## Images with text

Of the architectures of transformers' mapping for images with text that are not above, trained on text alone; images in
prompts are refused.

| family | | |
|---|---|---|
{images}
"""
NAMES = {"not built": "not tried"}


def row(name: str, found: families.Verdict) -> str:
    reason = found.notes if found.kind == "holds" else brief(found.text)
    return f"| {name} | {NAMES.get(found.kind, found.kind)} | {reason} |"


def brief(text: str) -> str:
    """Return a reason in the width of a table: without the figures of a refusal."""
    text = re.split(r", so that log q|Nats of", text)[0].removeprefix("RuntimeError: ").removeprefix("ValueError: ")
    text = text.replace("|", "/").replace("<", "&lt;").strip()
    return text if len(text) <= 240 else text[:237] + "..."


def page(found: dict[str, families.Verdict]) -> str:
    kinds = [verdict.kind for verdict in found.values()]
    order = sorted(set(kinds), key=("holds", "refused", "not built", "wrong", "crashes").index)
    totals = "\n".join(f"| {NAMES.get(kind, kind)} | {kinds.count(kind)} |" for kind in order)
    with_images = set(families.multimodal())
    rows = [row(name, verdict) for name, verdict in sorted(found.items()) if name not in with_images]
    images = [row(name, verdict) for name, verdict in sorted(found.items()) if name in with_images]
    return TEXT.format(
        version=transformers.__version__, totals=totals, rows="\n".join(rows), images="\n".join(images)
    )  # fmt: skip


def main() -> int:
    transformers.logging.set_verbosity_error()
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    found: dict[str, families.Verdict] = {}
    start = time.perf_counter()
    for name in names or families.families() + families.multimodal():
        found[name] = verdict = families.verdict(name)
        if names or verdict.kind in FAILURES:
            print(f"{name}: {verdict.kind}. {verdict.text} {verdict.notes}", flush=True)
    failed = [name for name, verdict in found.items() if verdict.kind in FAILURES]
    print(f"{len(found)} families in {time.perf_counter() - start:.0f} s, {len(failed)} failed")
    if names:
        return bool(failed)
    if "--check" not in sys.argv:
        PAGE.write_text(page(found))
    elif f"transformers {transformers.__version__} lists" in PAGE.read_text() and PAGE.read_text() != page(found):
        print(f"{PAGE.relative_to(ROOT)} is not what was found: run {Path(__file__).name} without --check")
        return 1
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
