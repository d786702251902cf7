"""Try every causal architecture of transformers (tests/families.py) and write docs/models.md.

families.py            tries all and writes the page
families.py --check    tries all; fails where one is wrong or crashes, or where the page says otherwise
families.py NAME ...   tries these and prints what was found
"""

from __future__ import annotations

import gc
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

dmfast trains the causal language models of transformers. For each of them, the distribution that is sampled must be the
distribution that is scored. This page lists what was found for every architecture that transformers {version} lists for
causal language modelling. `scripts/ci/families.py` writes it.

The script builds a small random model of each architecture and draws samples from it, with prompts of several lengths
and rows that end early. The configurations enable dropout and router jitter, which dmfast has to switch off. The
script checks two conditions in fp32:

- The log q of each sequence and its log-probability agree within 1e-4 nats with plain transformers, which gets each
  sequence by itself, unpadded and without a cache. dmfast scores the sequences together and alone, in training mode and
  in evaluation mode.
- The gradient of the loss agrees within 1e-3 of its largest entry.

A model that is not listed, or that brings its own code, is checked when it is first used. `LanguageModel` then scores
two of its first samples. If the scores differ, it refuses the model and says why (`check_scores`).

| result | families |
|---|---|
{totals}

- **holds**: both conditions hold. *Prompts of one length at a time* means that the model counts positions itself or
  does not ignore padding, so that dmfast runs a forward pass for each length of a prompt. *Without a cache* means
  that each step of sampling runs the whole sequence; a warning says so.
- **refused**: dmfast raises an error with the reason given.
- **not tried**: a small model cannot be built from its configuration alone, or the model does not run in plain
  transformers on text alone.

Sparse attention that selects the best keys (DeepSeek V3.2 and its relatives, Doge) was tried at lengths below the
number of selected keys. At greater lengths, two forward passes of different shapes may resolve a tie differently.

| family | result | note |
|---|---|---|
{rows}

## Images with text

This table has the architectures of transformers' mapping for images with text that are not listed above. They were
trained on text alone, because dmfast refuses images in prompts.

| family | result | note |
|---|---|---|
{images}
"""
NAMES = {"not built": "not tried"}


def row(name: str, found: families.Verdict) -> str:
    reason = found.notes if found.kind == "holds" else brief(found.text)
    return f"| {name} | {NAMES.get(found.kind, found.kind)} | {reason} |"


def brief(text: str) -> str:
    """Return a reason in the width of a table, without the figures of a refusal."""
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
    gc.freeze()  # this spares the collector what was imported
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
